"""Whether an answer stands in its passage: its content words and its numbers. A measure of words, not of meaning."""

from __future__ import annotations

import re
from typing import NamedTuple

WORD = re.compile(r"[^\W\d_]+")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
THOUSANDS = re.compile(r"(?<=\d)[,](?=\d{3}(?:\D|$))")
STEM = 5  # letters of a longer word that have to agree: `refund` and `refunded` are one
# The words that carry no content; short ones in general do not (see `content_words`).
WORDS_WITHOUT_CONTENT = """
about after also although another because been before being between both could does doing done each either from have having here into its itself just
like made make makes many more most much must neither none only other over same shall should since some such than that their them then there these
they this those through under until upon used uses using very were what when where whether which while whom whose will with within without would your
"""
EMPTY = frozenset(WORDS_WITHOUT_CONTENT.split())


class Grounding(NamedTuple):
    """`share` of the answer's content words that the passage holds, 1 without any; `numbers` that it lacks."""

    share: float
    numbers: list[str]


def ground(answer: str, passage: str) -> Grounding:
    wanted, held = content_words(answer), content_words(passage)
    known = set(numbers(passage))
    missing = [number for number in dict.fromkeys(numbers(answer)) if number not in known]
    return Grounding(len(wanted & held) / len(wanted) if wanted else 1.0, missing)


def content_words(text: str) -> frozenset[str]:
    """Stems of words of four letters and more (of two, where letters are not Latin), lower case."""
    words = (word.casefold() for word in WORD.findall(text))
    return frozenset(word[:STEM] for word in words if (len(word) > 3 or (not word.isascii() and len(word) > 1)) and word not in EMPTY)


def numbers(text: str) -> list[str]:
    """As digits alone: `1,000` is `1000`, `10.50` is `10.5`."""
    return [_plain(THOUSANDS.sub("", number)) for number in NUMBER.findall(text)]


def _plain(number: str) -> str:
    number = number.lstrip("0") or "0"
    number = f"0{number}" if number[0] in ".," else number
    whole, dot, rest = number.partition(".")
    return f"{whole}.{rest.rstrip('0')}".rstrip(".") if dot and "." not in rest else number
