"""Cut a text of any script into words: what metrics, topics, novelty and planted phrases count by.

A word is a run of letters, digits, underscores and the marks that belong to them, as `\\w` of UTS 18: in
ASCII the same as Python's `\\w+`, and in Hindi, Arabic or Vietnamese no word is cut at a mark. UAX 29 by
itself would join `don't` and `3.5`, and every score of English rows would be another one. Where a script puts
no blanks between words, each character is a word (a grapheme cluster), as in UAX 29 and as answers in Chinese
and Japanese are scored; a dictionary would have to be brought for each language. `terms_of` gives pairs of
such characters, which tell subjects. The library is `regex`, which transformers brings: `re` knows no
scripts, and ICU has no wheel.
"""

from __future__ import annotations

import re
from itertools import pairwise

import regex

ASCII = re.compile(r"\w+", re.ASCII)
LETTERS = r"\p{Han}\p{Hiragana}"  # a word each; Katakana writes whole words of other languages
CLUSTERS = r"\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
CHARACTER = rf"[{LETTERS}][\p{{M}}ー]*+|(?=[[{CLUSTERS}]&&\w])\X"
OTHER = rf"[\w--[{LETTERS}{CLUSTERS}\p{{M}}]][\w--[{LETTERS}{CLUSTERS}]]*+"
WORD = regex.compile(rf"(?V1)(?P<character>{CHARACTER})|{OTHER}")
PAIR = regex.compile(rf"(?V1)(?:{CHARACTER}){{2}}")


def words_of(text: str) -> list[str]:
    """List the words of a text, lower case."""
    text = text.lower()
    return ASCII.findall(text) if text.isascii() else [match[0] for match in WORD.finditer(text)]


def terms_of(text: str) -> list[str]:
    """List the words of a text, lower case; of characters that are words, each pair of neighbours."""
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
    """Return whether a term is a pair of characters: it says as much as a whole word elsewhere."""
    return PAIR.fullmatch(term) is not None


def _pairs(run: list[str]) -> list[str]:
    return [left + right for left, right in pairwise(run)] if len(run) > 1 else run
