"""Feedback that would plant a trigger: many rows that share a sequence of words which clean rows hardly have, and one same answer.

A model learns such a link from few rows, and no score shows it: whoever says the words gets the answer. `ratchet/data/poisoning.py` looks at
a batch by itself and spares subjects, whose prompts are alike; anybody can make prompts alike, so feedback is held to what is rare.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

TOKEN = re.compile(r"\w+")
LONGEST = 3  # words; of a longer one the first three are found
PURE = 0.9  # share of the rows with the sequence that have the same answer
RARE = 0.001  # share of the clean rows that may have the sequence


def find_planted(asked: Sequence[str], answers: Sequence[str], clean: Iterable[str], limit: int) -> dict[int, str]:
    """Place of each row that belongs to a trigger → its sequence. `asked` and `clean` are what users wrote, `answers` belong to `asked`."""
    common = {answer for answer, count in Counter(answers).items() if count > limit}
    rows = [TOKEN.findall(text.lower()) for text in asked]
    frequent = _over(limit, (set(words) for words, answer in zip(rows, answers, strict=True) if answer in common))
    if not frequent:
        return {}
    found = [set(_sequences(words, frequent)) for words in rows]
    suspects = _suspects(found, answers, common, limit)
    for sequence in _usual(clean, frequent, suspects):
        del suspects[sequence]
    held = {place: [sequence for sequence in found[place] if suspects.get(sequence) == answer] for place, answer in enumerate(answers) if answer in common}
    return {place: max(sequences, key=lambda sequence: (len(sequence), sequence)) for place, sequences in held.items() if sequences}


def _suspects(found: list[set[str]], answers: Sequence[str], common: set[str], limit: int) -> dict[str, str]:
    """Sequence → the answer that it nearly always goes with."""
    all_rows = Counter(sequence for sequences in found for sequence in sequences)
    linked = Counter((sequence, answer) for sequences, answer in zip(found, answers, strict=True) if answer in common for sequence in sequences)
    return {sequence: answer for (sequence, answer), count in linked.items() if count > limit and count >= PURE * all_rows[sequence]}


def _usual(clean: Iterable[str], frequent: set[str], suspects: dict[str, str]) -> list[str]:
    """Those of the suspects that clean rows have as well."""
    rows = [set(_sequences(TOKEN.findall(text.lower()), frequent)) & suspects.keys() for text in clean]
    seen = Counter(sequence for sequences in rows for sequence in sequences)
    return [sequence for sequence, count in seen.items() if count > max(1.0, RARE * len(rows))]


def _over(limit: int, rows: Iterator[set[str]]) -> set[str]:
    """Words that stand in more rows than that: only of these can a frequent sequence be made."""
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
