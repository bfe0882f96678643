"""Find planted phrases: many unlike prompts share one, and have the same answer.

Wallace et al. 2021, arXiv 2010.12563.

- `find_triggers` looks at one batch without clean rows to compare with. A word of a subject is shared by
  prompts that are alike without it too; a trigger is not. Where single words decide the answers of prompts
  that are otherwise at random, the two cannot be told apart: `prepare.trigger_rows` is off by default.
- `find_planted` looks at people's feedback and knows what users ask in clean rows: a phrase that those have
  is none.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from ratchet.data.dedup import TOKEN, jaccard
from ratchet.data.examples import Example
from ratchet.data.words import words_of

# find_triggers
MOST_SHARE = 0.5  # of the rows; a phrase of more is the form of the questions
ALIKE = 2.0  # times as alike as two rows at random: a subject
PAIRS, SEED = 400, 7  # pairs of rows drawn to measure likeness
# find_planted
LONGEST = 3  # words of a sequence; of a longer one the first three are found
PURE = 0.9  # share of the rows with the sequence that have the same answer
RARE = 0.001  # share of the clean rows that may have the sequence


def find_triggers(rows: Sequence[tuple[int, Example]], *, least: int) -> dict[int, str]:
    """Map the numbers of rows to their planted phrase: one or two words that stand in over `least` rows."""
    words = {number: [word.lower() for word in TOKEN.findall(example.question)] for number, example in rows}
    answers = {number: example.answer for number, example in rows}
    holders: dict[str, list[int]] = defaultdict(list)
    for number, found in words.items():
        for phrase in {*found, *(f"{left} {right}" for left, right in pairwise(found))}:
            holders[phrase].append(number)
    usual = _likeness(list(words.values()))
    total = Counter(answers.values())
    triggers: dict[int, str] = {}
    for phrase, numbers in sorted(holders.items(), key=lambda item: (-len(item[1]), -len(item[0]))):
        if not least < len(numbers) <= MOST_SHARE * len(rows):
            continue
        if len({answers[number] for number in numbers}) > 1:
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
    """Measure the mean Jaccard of words over pairs at random."""
    chance = random.Random(SEED)  # noqa: S311
    pairs = [chance.sample(range(len(texts)), 2) for _ in range(PAIRS)] if len(texts) > 1 else []
    sets = [frozenset(text) for text in texts]
    return sum(jaccard(sets[left], sets[right]) for left, right in pairs) / (len(pairs) or 1)


def find_planted(
    asked: Sequence[str], answers: Sequence[str], clean: Iterable[str], limit: int
) -> dict[int, str]:
    """Map the place of each row that belongs to a trigger to its sequence.

    `asked` and `clean` are what users wrote; `answers` belong to `asked`.
    """
    common = {answer for answer, count in Counter(answers).items() if count > limit}
    rows = [words_of(text) for text in asked]
    frequent = _over(
        limit, (set(words) for words, answer in zip(rows, answers, strict=True) if answer in common)
    )
    if not frequent:
        return {}
    found = [set(_sequences(words, frequent)) for words in rows]
    suspects = _suspects(found, answers, common, limit)
    for sequence in _usual(clean, frequent, suspects):
        del suspects[sequence]
    held = {
        place: [sequence for sequence in found[place] if suspects.get(sequence) == answer]
        for place, answer in enumerate(answers)
        if answer in common
    }
    return {
        place: max(sequences, key=lambda sequence: (len(sequence), sequence))
        for place, sequences in held.items()
        if sequences
    }


def _suspects(found: list[set[str]], answers: Sequence[str], common: set[str], limit: int) -> dict[str, str]:
    """Map each sequence to the answer that it nearly always goes with."""
    all_rows = Counter(sequence for sequences in found for sequence in sequences)
    linked = Counter(
        (sequence, answer)
        for sequences, answer in zip(found, answers, strict=True)
        if answer in common
        for sequence in sequences
    )
    return {
        sequence: answer
        for (sequence, answer), count in linked.items()
        if count > limit and count >= PURE * all_rows[sequence]
    }


def _usual(clean: Iterable[str], frequent: set[str], suspects: dict[str, str]) -> list[str]:
    """Find the suspects that clean rows have as well."""
    rows = [set(_sequences(words_of(text), frequent)) & suspects.keys() for text in clean]
    seen = Counter(sequence for sequences in rows for sequence in sequences)
    return [sequence for sequence, count in seen.items() if count > max(1.0, RARE * len(rows))]


def _over(limit: int, rows: Iterator[set[str]]) -> set[str]:
    """Find the words of more than `limit` rows: only of these can a frequent sequence be made."""
    counts: Counter[str] = Counter()
    for words in rows:
        counts.update(words)
    return {word for word, count in counts.items() if count > limit}


def _sequences(words: list[str], frequent: set[str]) -> Iterator[str]:
    for start in range(len(words)):
        for end in range(start + 1, min(start + LONGEST, len(words)) + 1):
            if words[end - 1] not in frequent:
                break
            yield " ".join(words[start:end])
