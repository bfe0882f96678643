"""Find planted phrases: triggers that many dissimilar prompts share, all with the same answer.

Wallace et al. 2021, arXiv 2010.12563.

- `find_triggers` examines one batch, without clean rows to compare with. Prompts that share a word of their
  subject are also similar without it; prompts that share a trigger are not. In data where single words decide
  the answers of otherwise random prompts, the two look the same: `prepare.trigger_rows` is off by default.
- `find_planted` examines users' feedback and compares it with the prompts of clean rows: a phrase that also
  occurs there is no trigger.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise, takewhile

from ratchet.data.dedup import TOKEN, jaccard
from ratchet.data.examples import Example
from ratchet.data.words import words_of

# find_triggers
MOST_SHARE = 0.5  # of the rows; a phrase in more of them belongs to the form of the questions
ALIKE = 2.0  # times the similarity of random pairs; rows above it share a subject
PAIRS, SEED = 400, 7  # random pairs of rows, to measure their similarity
# find_planted
LONGEST = 3  # words of a sequence; of a longer trigger, a part is found
PURE = 0.9  # share of the rows with the sequence that have the same answer, at least
RARE = 0.001  # share of the clean rows that may have the sequence, at most


def find_triggers(rows: Sequence[tuple[int, Example]], *, least: int) -> dict[int, str]:
    """Return row number → planted phrase: one or two words that more than `least` rows contain."""
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
        parts = frozenset(_whole([words[number] for number in numbers], phrase.split()))
        rest = [[word for word in words[number] if word not in parts] for number in numbers]
        if _likeness(rest) <= ALIKE * usual:
            for number in numbers:
                triggers.setdefault(number, phrase)
    return triggers


def _whole(texts: Sequence[list[str]], phrase: list[str]) -> list[str]:
    """Return the longest sequence around the phrase that all texts share: a longer trigger.

    What is left of such a trigger would make the rest of its rows look alike.
    """
    size = len(phrase)
    found = [next(at for at in range(len(text)) if text[at : at + size] == phrase) for text in texts]
    before = _common([text[:at][::-1] for text, at in zip(texts, found, strict=True)])
    after = _common([text[at + size :] for text, at in zip(texts, found, strict=True)])
    return [*before[::-1], *phrase, *after]


def _common(texts: Sequence[list[str]]) -> list[str]:
    """Return the words with which all texts begin."""
    return [words[0] for words in takewhile(lambda words: len({*words}) == 1, zip(*texts, strict=False))]


def _likeness(texts: Sequence[Iterable[str]]) -> float:
    """Return the mean Jaccard similarity, of words, over random pairs of texts."""
    chance = random.Random(SEED)  # noqa: S311
    pairs = [chance.sample(range(len(texts)), 2) for _ in range(PAIRS)] if len(texts) > 1 else []
    sets = [frozenset(text) for text in texts]
    return sum(jaccard(sets[left], sets[right]) for left, right in pairs) / (len(pairs) or 1)


def find_planted(
    asked: Sequence[str], answers: Sequence[str], clean: Iterable[str], limit: int
) -> dict[int, str]:
    """Return place of a row → its planted sequence, for rows with one.

    `asked` and `clean` are texts of users; `answers` belong to `asked`. A sequence is planted only if more
    than `limit` rows have it and the same answer.
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
    """Return sequence → answer, for sequences of many rows of which nearly all have that answer."""
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
    """Return the suspects that also occur in clean rows."""
    rows = [set(_sequences(words_of(text), frequent)) & suspects.keys() for text in clean]
    seen = Counter(sequence for sequences in rows for sequence in sequences)
    return [sequence for sequence, count in seen.items() if count > max(1.0, RARE * len(rows))]


def _over(limit: int, rows: Iterator[set[str]]) -> set[str]:
    """Return the words of more than `limit` rows, since only they can form a frequent sequence."""
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
