"""Clean texts, find faults that make them unfit, guess their language; hold patterns that modules share.

Control tokens are searched in the text as written and in its NFKC form without hidden characters, so that
none passes in full width or split by a zero-width space (UTS 39). The text that is kept is in NFC
(`ratchet.data.examples.normalise`), because NFKC would turn x² into x2.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections import Counter
from urllib.parse import urlsplit

from ratchet.data.examples import RowError, trim

# --- what a model says of itself, and refusals --------------------------------------------------------------
# The patterns are for different kinds of texts, so they differ on purpose; a shared part is written once.

AS_AN_AI = r"\bas an? (?:ai|artificial intelligence|(?:large )?language model)\b"
# For rows of people: anywhere in the answer; includes refusals, since one reason stands for both.
BOILERPLATE = re.compile(
    AS_AN_AI + r"|\bi(?:'m| am) (?:just )?an? (?:ai|language model)\b"
    r"|\bi (?:cannot|can't|can not|am unable to|'m unable to) (?:assist|help|fulfill|comply)\b"
    r"|\bmy (?:training data|knowledge cutoff)\b",
    re.IGNORECASE,
)
# For a teacher's rows: also applied to questions, with more spellings; refusals have their own reason.
TEACHER_BOILERPLATE = re.compile(
    AS_AN_AI + r"|\bi(?:'|’)?(?: a)?m (?:just |only )?an? (?:ai|language model)\b"
    r"|\bmy (?:training data|knowledge cut-?off)\b",
    re.IGNORECASE,
)
# For a teacher that declines: a false alarm costs only a row, so "no answer" and "n/a" count too.
TEACHER_REFUSAL = re.compile(
    r"\A\W*(?:i(?:'|’)?(?: a)?m (?:very |really )?sorry\b|sorry,|i apologi[sz]e\b|unfortunately, i\b"
    r"|i (?:can(?:not|'t|’t| not)|am unable|(?:'|’)m unable|won(?:'|’)t"
    r"|do not have access|don(?:'|’)t have access)\b"
    r"|i(?:'|’)m (?:unable|not able)\b|i am not able\b|no answer\b|n/?a\W*\Z)",
    re.IGNORECASE,
)
# For the metric `refusal`, at the start of an answer: "I don't know" counts; a bare "no answer", which may be
# right, does not.
REFUSAL = re.compile(
    r"^\W*(?:(?:i[’']?m|i am|we are) (?:very |so )?(?:sorry|afraid)|sorry\b"
    r"|(?:unfortunately,? )?i (?:can[’']?t|can ?not|could ?n[’']?t|won[’']?t"
    r"|(?:am|[’']m) (?:not able|unable))"
    r"|i (?:do not|don[’']?t) (?:know|have (?:access|(?:any |enough )?information))"
    r"|as an? (?:ai|(?:large )?language model))",
    re.IGNORECASE,
)
# For drift, which compares two windows: starts suffice, since both windows miss about the same refusals.
REFUSAL_STARTS = ("i cannot", "i can't", "i am unable", "i'm unable", "i'm sorry", "i am sorry", "as an ai")

# --- characters ---------------------------------------------------------------------------------------------

PLAIN = re.compile(r"[\t\n\x20-\x7e]*")
ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
CONTROLS = re.compile(r"[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")
LINE_ENDS = re.compile("\r|\x85|\u2028|\u2029")
# Between ASCII characters, a zero-width joiner or space hides something; Khmer, Thai, Persian, Indic scripts
# and emoji need them, and flags need tag characters.
HIDDEN = re.compile(
    "[\u2060-\u2064\ufeff\u00ad\u034f\u180e]"
    "|(?<!\U0001f3f4)(?<![\U000e0020-\U000e007e])[\U000e0000-\U000e007f]+|[\U000e0100-\U000e01ef]{2,}"
    "|(?<=[\\x00-\\x7f])[\u200b-\u200d]+(?=[\\x00-\\x7f])"
)
# Share of hidden characters above which a text is rejected, unless it has at most FEW_HIDDEN of them.
MOST_HIDDEN, FEW_HIDDEN = 0.01, 3
OVERRIDES = re.compile("[\u202a-\u202e]")  # they reverse the direction of the text that follows
ISOLATES = re.compile("[\u2066-\u2069]")  # they set the direction of an isolated part only
# Those of the large families of models; the base's own need no list, because
# ratchet/models/chat_template.py splits them into plain characters.
CONTROL_TOKENS = re.compile(
    r"<\|(?! )[\w ./:-]{1,40}(?<! )\|>|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]"
    r"|<</?SYS>>|</?think>|(?-i:</s>|(?<!\w)<s>)"
    r"|<(?:start|end)_of_(?:turn|image|audio)>|<(?:bos|eos|pad|unk)>|<begin▁of▁sentence>",
    re.IGNORECASE,
)
ALNUM_WORD, LATIN = re.compile(r"[^\W_]+"), re.compile("[A-Za-z]")
# Letters that look like Latin ones (UTS 39, confusables), without the Greek ones that formulas use.
LOOKALIKES = frozenset("аеорсухіјѕԁһӏԛԝАВЕКМНОРСТУХІЈЅοΟΑΒΕΖΗΙΚΜΝΡΤΥΧ")
# Traces of UTF-8 read as Latin-1 or Windows-1252: é, Cyrillic, Chinese.
HALF = "\x80-\xbf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u203a\u20ac\u2122"
MOJIBAKE = re.compile(
    f"Ã[{HALF}]|Â[\xa0-\xbf]|â€|[ÐÑ][{HALF}]|[ä-é][\x80-\xaa\xac-\xba\xbc-\xbf]{{2}}|\ufffd"
)
MOST_MOJIBAKE = 0.02  # of the characters
LOOP_RATIO, LOOP_LEAST = 20, 400  # bytes before zlib to bytes after; bytes that a text needs to reach it
LEAST = 20  # characters; on fewer, the language classifier is not reliable


def clean(text: str, sanitised: Counter[str], *, isolates: bool = False) -> str:
    """Remove hidden and control characters from `text`, and count the kinds of changes in `sanitised`.

    If `isolates` is true, direction isolates are accepted and stay. Raises RowError for a text that cannot be
    cleaned.
    """
    if trim(text) != text:
        sanitised["outer_blanks"] += 1  # that `make_example` strips
    if PLAIN.fullmatch(text):
        return text
    _check_encoding(text, isolates=isolates)
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


def _check_encoding(text: str, *, isolates: bool) -> None:
    """Raise RowError for NUL, a lone surrogate, a direction override, or text read in a wrong encoding."""
    if "\x00" in text:
        raise RowError("nul_character", "a text holds a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowError("lone_surrogate", "a text holds half a character (a lone surrogate)") from None
    if OVERRIDES.search(text) or (not isolates and ISOLATES.search(text)):
        raise RowError(
            "bidi_override",
            "a text holds a character that turns the direction of writing (U+202A to E, U+2066 to 9): "
            "it can be read as what it is not (`prepare.isolates: keep` takes U+2066 to 9)",
        )
    if (broken := sum(len(match) for match in MOJIBAKE.findall(text))) > MOST_MOJIBAKE * len(text):
        raise RowError(
            "mojibake",
            f"{broken} of {len(text)} characters are of a text that was read in the wrong encoding",
        )


def check_text(text: str, allowed: frozenset[str] | None) -> None:
    """Raise RowError for a control token not in `allowed` (None: all are)."""
    if allowed is not None and (found := find_token(text, allowed)):
        raise RowError(
            "control_token",
            f"a text holds the control token {found!r} (`prepare.control_tokens: keep` takes it as text)",
        )


def check_loop(text: str) -> None:
    """Raise RowError for a text that repeats itself and says nearly nothing else."""
    size = len(text) if text.isascii() else len(text.encode())
    if size >= LOOP_LEAST and size > LOOP_RATIO * len(zlib.compress(text.encode(), 1)):
        raise RowError("loop", f"a text of {size} bytes says nearly nothing: it repeats itself")


def find_token(text: str, allowed: frozenset[str] = frozenset()) -> str | None:
    """Return a control token that is not `allowed`, in any spelling, or None."""
    if text.isascii() and "<" not in text and "[" not in text:
        return None
    forms = [text] if text.isascii() else [text, unicodedata.normalize("NFKC", HIDDEN.sub("", text))]
    found = (match.group() for form in forms for match in CONTROL_TOKENS.finditer(form))
    return next((token for token in found if token not in allowed), None)


def find_mixed_word(text: str) -> str | None:
    """Return a word that mixes Latin letters with others that look like them, or None."""
    if text.isascii():
        return None
    words = (match.group() for match in ALNUM_WORD.finditer(text))
    return next((word for word in words if LOOKALIKES & set(word) and LATIN.search(word)), None)


def strip_url(url: str) -> str:
    """Return the URL without login and query, which may be secrets, for use in messages, rows and commits."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def language_of(text: str) -> str | None:
    """Guess the language as ISO 639-1; None for a text that is too short to tell."""
    import py3langid

    return str(py3langid.classify(text)[0]) if len(text) >= LEAST else None
