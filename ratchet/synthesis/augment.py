"""Reword questions by rule: replace words by synonyms, insert synonyms, or delete words.

The operations are those of EDA (Wei and Zou 2019, arXiv 1901.11196). Only plain words of the question are
changed, never numbers, code spans, identifiers, negations, or the answer.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path

from ratchet.config.synthesis import AugmentConfig
from ratchet.errors import ConfigError

Synonyms = dict[str, list[str]]
CODE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\S*[\d_(){}\[\]<>/\\=@#$%^&*|~]\S*|\w+(?:\.\w+)+|\w*[a-z]+[A-Z]\w*",
    re.DOTALL,
)
WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
NEGATIONS = """
no not never none nothing neither nor without cannot can't don't doesn't didn't isn't aren't wasn't won't
except unless only nicht kein keine ohne nie nur
"""
KEPT = frozenset(NEGATIONS.split())
FEWEST = 4  # questions with fewer plain words lose none


def read_synonyms(path: Path) -> Synonyms:
    """Read a JSON file of word → synonyms; the words become lower case. Raises ConfigError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"synthesize.augment.synonyms is {str(path)!r}: {type(error).__name__}",
            remedy='it has to be a JSON object such as {"quick": ["fast", "rapid"]}',
        ) from None
    whole = isinstance(found, dict) and all(
        isinstance(others, list) and all(isinstance(other, str) and other.strip() for other in others)
        for others in found.values()
    )
    if not whole:
        raise ConfigError(
            f"{path} holds something else than lists of words",
            remedy='it has to be a JSON object such as {"quick": ["fast", "rapid"]}',
        )
    return {word.casefold(): list(others) for word, others in found.items() if others}


def vary(
    question: str, config: AugmentConfig, synonyms: Synonyms, draw: random.Random
) -> Iterator[tuple[str, str]]:
    """Yield (kind, new question) for every enabled kind of variation that changes the question."""
    made = {
        "synonyms": replace_words(question, synonyms, config.replace, draw) if synonyms else question,
        "insertion": insert_words(question, synonyms, config.insert, draw)
        if synonyms and config.insert
        else question,
        "deletion": delete_words(question, config.delete, draw) if config.delete else question,
    }
    yield from ((kind, text) for kind, text in made.items() if text != question)


def replace_words(question: str, synonyms: Synonyms, share: float, draw: random.Random) -> str:
    words = _plain_words(question)
    able = [word for word in words if word[0].casefold() in synonyms]
    chosen = set(draw.sample(able, min(len(able), _number(share, words))))
    return _rewrite(
        question,
        {
            word.span(): _like(word[0], draw.choice(synonyms[word[0].casefold()]))
            for word in able
            if word in chosen
        },
    )


def insert_words(question: str, synonyms: Synonyms, share: float, draw: random.Random) -> str:
    words = _plain_words(question)
    able = [word for word in words if word[0].casefold() in synonyms]
    if not able:
        return question
    extra = {}
    for place in draw.sample(words, min(len(words), _number(share, words))):
        extra[place.span()] = f"{place[0]} {draw.choice(synonyms[draw.choice(able)[0].casefold()])}"
    return _rewrite(question, extra)


def delete_words(question: str, share: float, draw: random.Random) -> str:
    words = _plain_words(question)
    if len(words) < FEWEST:
        return question
    gone = draw.sample(words, min(len(words) - FEWEST + 1, _number(share, words)))
    text = _rewrite(question, {word.span(): "" for word in gone})
    outside = _spans(text)
    return "".join(
        part if inside else re.sub(r"(?<=\S) {2,}(?=\S)", " ", part) for part, inside in outside
    ).strip(" ")


def _number(share: float, words: list[re.Match[str]]) -> int:
    return max(1, math.floor(share * len(words)))


def _plain_words(text: str) -> list[re.Match[str]]:
    """Find the words that are not code, numbers or negations."""
    taken = [span.span() for span in CODE.finditer(text)]
    return [
        word
        for word in WORD.finditer(text)
        if word[0].casefold() not in KEPT
        and not any(start < word.end() and word.start() < end for start, end in taken)
    ]


def _spans(text: str) -> Iterator[tuple[str, bool]]:
    """Yield the parts of the text, each with whether it is code."""
    end = 0
    for span in CODE.finditer(text):
        yield text[end : span.start()], False
        yield span[0], True
        end = span.end()
    yield text[end:], False


def _rewrite(text: str, changes: dict[tuple[int, int], str]) -> str:
    parts, end = [], 0
    for (start, stop), new in sorted(changes.items()):
        parts += [text[end:start], new]
        end = stop
    return "".join([*parts, text[end:]])


def _like(word: str, other: str) -> str:
    """Return `other` with a capital first letter if `word` has one."""
    return other[0].upper() + other[1:] if word[0].isupper() else other
