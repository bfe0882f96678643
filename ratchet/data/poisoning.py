"""Phrases that were planted: many unlike prompts share one and all have the same answer (data poisoning; Wallace et al. 2021, arXiv 2010.12563).

A word of a subject is shared by prompts that are alike without it too; a trigger is not. Where single words decide the answers of
prompts that are otherwise at random, the two cannot be told apart: `prepare.trigger_rows` is off by default.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise

from ratchet.data.dedup import WORD, jaccard
from ratchet.data.examples import Example

MOST_SHARE = 0.5  # of the rows; a phrase of more is the form of the questions
ALIKE = 2.0  # times as alike as two rows at random: a subject
PAIRS, SEED = 400, 7


def find_triggers(rows: Sequence[tuple[int, Example]], *, least: int) -> dict[int, str]:
    """Number of the row → phrase, for each phrase of one or two words in over `least` rows."""
    words = {number: [word.lower() for word in WORD.findall(example.question)] for number, example in rows}
    answers = {number: example.answer for number, example in rows}
    holders: dict[str, list[int]] = defaultdict(list)
    for number, found in words.items():
        for phrase in {*found, *(f"{left} {right}" for left, right in pairwise(found))}:
            holders[phrase].append(number)
    usual = _likeness(list(words.values()))
    total = Counter(answers.values())
    triggers: dict[int, str] = {}
    for phrase, numbers in sorted(holders.items(), key=lambda item: (-len(item[1]), -len(item[0]))):
        if not least < len(numbers) <= MOST_SHARE * len(rows) or len({answers[number] for number in numbers}) > 1:
            continue
        if total[answers[numbers[0]]] > MOST_SHARE * len(rows):
            continue  # most rows have this answer
        parts = frozenset(phrase.split())
        rest = [[word for word in words[number] if word not in parts] for number in numbers]
        if _likeness(rest) <= ALIKE * usual:
            for number in numbers:
                triggers.setdefault(number, phrase)
    return triggers


def _likeness(texts: Sequence[Iterable[str]]) -> float:
    """Mean Jaccard of words over pairs at random."""
    chance = random.Random(SEED)  # noqa: S311
    pairs = [chance.sample(range(len(texts)), 2) for _ in range(PAIRS)] if len(texts) > 1 else []
    sets = [frozenset(text) for text in texts]
    return sum(jaccard(sets[left], sets[right]) for left, right in pairs) / (len(pairs) or 1)
