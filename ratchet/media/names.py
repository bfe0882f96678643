"""Names and references of pictures and recordings, and where they stand in a text."""

from __future__ import annotations

import base64
import binascii
import re

from ratchet.errors import RowError

MEDIA_MARK = "\ufffc"  # U+FFFC, object replacement character: where a picture or a recording stands in a text
MEDIA = "media:"  # before a name, in rows of batches
MEDIA_ERROR = "media-error:"  # before the reason and the message for what was not taken
MEDIA_NAME = re.compile(r"[0-9a-f]{64}\.(?:png|jpg|flac)")
SOUND = ".flac"  # the end of a recording's name


def is_sound(name: str) -> bool:
    """Tell whether a name, or a path, is that of a stored recording."""
    return name.endswith(SOUND)


def kind_of(name: str) -> str:
    """Return what a name stands for, as a word for people."""
    return "recording" if is_sound(name) else "picture"


def in_words(text: str) -> str:
    """Return a text for people, with words in the place of its pictures and recordings."""
    return text.replace(MEDIA_MARK, " [picture or recording] ")


def from_uri(uri: str) -> bytes:
    """Return the bytes of a data URI. Raises RowError."""
    head, comma, content = uri.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise RowError("media_broken", f"the data URI {head[:40]!r} is not written in base64")
    return from_base64(content)


def from_base64(text: str) -> bytes:
    """Return the bytes of a text in base64. Raises RowError."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise RowError("media_broken", "its base64 is broken or cut off") from None
