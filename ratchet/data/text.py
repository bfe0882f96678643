"""What is taken out of a text, and what makes it unfit: hidden characters, control tokens, loops, broken encodings.

Checks see the text as it was written and in NFKC without hidden characters, so that no token slips through in full width or cut by
a zero-width space (UTS 39). What is kept is NFC (`ratchet.data.examples.normalise`): NFKC would turn x² into x2.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections import Counter

from ratchet.data.examples import RowError

PLAIN = re.compile(r"[\t\n\x20-\x7e]*")
ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
CONTROLS = re.compile(r"[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")
LINE_ENDS = re.compile("\r|\x85|\u2028|\u2029")
# Between ASCII letters a joiner or a blank of no width hides something; Khmer, Thai, Persian, Indic scripts and emoji need theirs, flags their tags.
HIDDEN = re.compile(
    "[\u2060-\u2064\ufeff\u00ad\u034f\u180e]|(?<!\U0001f3f4)(?<![\U000e0020-\U000e007e])[\U000e0000-\U000e007f]+|[\U000e0100-\U000e01ef]{2,}"
    "|(?<=[\\x00-\\x7f])[\u200b-\u200d]+(?=[\\x00-\\x7f])"
)
MOST_HIDDEN, FEW_HIDDEN = 0.01, 3  # of the characters; so many are taken out of a short text too
BIDI = re.compile("[\u202a-\u202e\u2066-\u2069]")
# Of the large families; the base's own tokens are split into plain characters by ratchet/models/chat_template.py whatever they are.
TOKENS = re.compile(
    r"<\|(?! )[\w ./:-]{1,40}(?<! )\|>|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]|<</?SYS>>|</?think>|(?-i:</s>|(?<!\w)<s>)"
    r"|<(?:start|end)_of_(?:turn|image|audio)>|<(?:bos|eos|pad|unk)>|<begin▁of▁sentence>",
    re.IGNORECASE,
)
WORD, LATIN = re.compile(r"[^\W_]+"), re.compile("[A-Za-z]")
# Letters that look like Latin ones (UTS 39, confusables): Greek ones that formulas use stay out.
LOOKALIKES = frozenset("аеорсухіјѕԁһӏԛԝАВЕКМНОРСТУХІЈЅοΟΑΒΕΖΗΙΚΜΝΡΤΥΧ")
# UTF-8 read as Latin-1 or Windows-1252: é, Cyrillic, Chinese.
HALF = "\x80-\xbf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u203a\u20ac\u2122"
MOJIBAKE = re.compile(
    f"Ã[{HALF}]|Â[\xa0-\xbf]|â€|[ÐÑ][{HALF}]|[ä-é][\x80-\xaa\xac-\xba\xbc-\xbf]{{2}}|\ufffd"
)
MOST_MOJIBAKE = 0.02  # of the characters
LOOP_RATIO, LOOP_LEAST = 20, 400  # bytes before and after zlib; shorter texts cannot reach it
LEAST = 20  # characters; on less the classifier guesses


def clean(text: str, sanitised: Counter[str]) -> str:
    """Without hidden and control characters; what was taken out is counted. Raises RowError for a text that is unfit as a whole."""
    if PLAIN.fullmatch(text):
        return text
    if "\x00" in text:
        raise RowError("nul_character", "a text holds a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowError("lone_surrogate", "a text holds half a character (a lone surrogate)") from None
    if BIDI.search(text):
        raise RowError(
            "bidi_override",
            "a text holds a character that turns the direction of writing (U+202A to E, U+2066 to 9): it can be read as what it is not",
        )
    if (broken := sum(len(match) for match in MOJIBAKE.findall(text))) > MOST_MOJIBAKE * len(text):
        raise RowError(
            "mojibake",
            f"{broken} of {len(text)} characters are of a text that was read in the wrong encoding",
        )
    if LINE_ENDS.search(text):
        sanitised["line_ends"] += 1
    shown, controls = CONTROLS.subn("", ESCAPES.sub("", text))
    if controls or len(shown) != len(text):
        sanitised["control_characters"] += 1
    kept = HIDDEN.sub("", shown)
    if hidden := len(shown) - len(kept):
        if hidden > max(FEW_HIDDEN, MOST_HIDDEN * len(shown)):
            raise RowError(
                "hidden_characters", f"{hidden} of {len(shown)} characters cannot be seen (zero-width, tags)"
            )
        sanitised["hidden_characters"] += 1
    return kept


def check_text(text: str, allowed: frozenset[str]) -> None:
    """Raises RowError: a control token (not one of `allowed`), a loop."""
    if found := find_token(text, allowed):
        raise RowError("control_token", f"a text holds the control token {found!r}")
    size = len(text) if text.isascii() else len(text.encode())
    if size >= LOOP_LEAST and size > LOOP_RATIO * len(zlib.compress(text.encode(), 1)):
        raise RowError("loop", f"a text of {size} bytes says nearly nothing: it repeats itself")


def find_token(text: str, allowed: frozenset[str] = frozenset()) -> str | None:
    """A control token, in any spelling."""
    if text.isascii() and "<" not in text and "[" not in text:
        return None
    forms = [text] if text.isascii() else [text, unicodedata.normalize("NFKC", HIDDEN.sub("", text))]
    return next(
        (match.group() for form in forms for match in TOKENS.finditer(form) if match.group() not in allowed),
        None,
    )


def find_mixed_word(text: str) -> str | None:
    """A word of Latin letters and of others that look like Latin ones."""
    if text.isascii():
        return None
    return next(
        (
            match.group()
            for match in WORD.finditer(text)
            if LOOKALIKES & set(match.group()) and LATIN.search(match.group())
        ),
        None,
    )


def language_of(text: str) -> str | None:
    """ISO 639-1; None for a text that is too short to tell."""
    import py3langid

    return str(py3langid.classify(text)[0]) if len(text) >= LEAST else None
