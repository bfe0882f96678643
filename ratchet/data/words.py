"""Cut a text of any script into words, the unit that metrics, topics, novelty and planted phrases count.

A word is a run of letters, digits, underscores and the marks that belong to them, as `\\w` of UTS 18: in
ASCII the same as Python's `\\w+`, and in Hindi, Arabic or Vietnamese no word is cut at a mark. UAX 29 would
keep `don't` and `3.5` whole, which would change every score of English rows. In scripts without blanks
between words, each character (grapheme cluster) is a word, as in UAX 29 and as answers in Chinese and
Japanese are scored; real words would need a dictionary for each language. `terms_of` gives pairs of such
characters, which identify subjects better. The library is `regex`, which transformers requires: `re` knows no
scripts, and ICU has no wheel.
"""

from __future__ import annotations

import re
from itertools import pairwise

import regex

ASCII = re.compile(r"\w+", re.ASCII)
LETTERS = r"\p{Han}\p{Hiragana}"  # a word each; not Katakana, which spells whole foreign words
CLUSTERS = r"\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
CHARACTER = rf"[{LETTERS}][\p{{M}}ー]*+|(?=[[{CLUSTERS}]&&\w])\X"
OTHER = rf"[\w--[{LETTERS}{CLUSTERS}\p{{M}}]][\w--[{LETTERS}{CLUSTERS}]]*+"
WORD = regex.compile(rf"(?V1)(?P<character>{CHARACTER})|{OTHER}")
PAIR = regex.compile(rf"(?V1)(?:{CHARACTER}){{2}}")


def words_of(text: str) -> list[str]:
    """List the words of a text, in lower case."""
    text = text.lower()
    return ASCII.findall(text) if text.isascii() else [match[0] for match in WORD.finditer(text)]


def terms_of(text: str) -> list[str]:
    """List the words of a text, in lower case; of characters that are words, each pair of neighbours."""
    text = text.lower()
    if text.isascii():
        return ASCII.findall(text)
    terms: list[str] = []
    run: list[str] = []  # characters that follow one another
    end = -1
    for match in WORD.finditer(text):
        if run and (match.start() != end or not match["character"]):
            terms += _pairs(run)
            run = []
        if match["character"]:
            run.append(match[0])
        else:
            terms.append(match[0])
        end = match.end()
    return terms + _pairs(run)


def is_pair(term: str) -> bool:
    """Return whether a term is a pair of characters, which counts as much as a whole word elsewhere."""
    return PAIR.fullmatch(term) is not None


def _pairs(run: list[str]) -> list[str]:
    return [left + right for left, right in pairwise(run)] if len(run) > 1 else run
