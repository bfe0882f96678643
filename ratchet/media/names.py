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
NOT_BASE64 = re.compile(r"[^A-Za-z0-9+/=]")
PATH = re.compile(r"[^\n\x00]{1,1000}\.[A-Za-z0-9]{2,5}")  # of a file, or an address; base64 has no dot
SHOWN = 80  # characters of a path in a message


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
    given = "".join(text.split())
    try:
        return base64.b64decode(given, validate=True)
    except (binascii.Error, ValueError):
        raise RowError("media_broken", _why_not_base64(text.strip(), given)) from None


def _why_not_base64(text: str, given: str) -> str:
    if PATH.fullmatch(text):
        return f"it is the path {text[:SHOWN]!r} in place of base64; wanted the bytes of that file in base64"
    if other := NOT_BASE64.search(given):
        return f"its base64 is broken: character {other.start() + 1} is {other[0]!r}"
    return f"its base64 is cut off or broken: {len(given)} characters, wanted a multiple of 4"


def name_type(data: bytes) -> str:
    """Return words for bytes of no known type: the path that they are, or `a file`."""
    text = data[:1024].decode("utf-8", "replace").strip()
    return f"the path {text[:SHOWN]!r}" if len(data) < 1024 and PATH.fullmatch(text) else "a file"
