"""Scores of one answer against one reference, each in 0..1, higher is better."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

WORD = re.compile(r"\w+")


def exact_match(answer: str, reference: str) -> float:
    """1 when equal but for blanks."""
    return float(" ".join(answer.split()) == " ".join(reference.split()))


def token_f1(answer: str, reference: str) -> float:
    """F1 over words, as multisets, lower case (SQuAD, arXiv 1606.05250, without its removal of articles). Without words on both sides: exact match."""
    left, right = Counter(_words(answer)), Counter(_words(reference))
    common = sum((left & right).values())
    if not common:
        return exact_match(answer, reference) if not left and not right else 0.0
    precision, recall = common / sum(left.values()), common / sum(right.values())
    return 2 * precision * recall / (precision + recall)


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, lower case (Lin 2004, W04-1013). Without words on both sides: exact match."""
    left, right = _words(answer), _words(reference)
    longest = _longest_common(left, right)
    if not longest:
        return exact_match(answer, reference) if not left and not right else 0.0
    return 2 * longest / (len(left) + len(right))


def chrf(answer: str, reference: str) -> float:
    """chrF2 by sacrebleu, divided by 100 (Popović 2015, W15-3049)."""
    from sacrebleu import sentence_chrf

    return float(sentence_chrf(answer, [reference]).score) / 100


ROW_METRICS: dict[str, Callable[[str, str], float]] = {"exact_match": exact_match, "token_f1": token_f1, "rouge_l": rouge_l, "chrf": chrf}


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _longest_common(left: list[str], right: list[str]) -> int:
    row = [0] * (len(right) + 1)
    for word in left:
        diagonal = 0
        for position, other in enumerate(right, start=1):
            diagonal, row[position] = row[position], diagonal + 1 if word == other else max(row[position], row[position - 1])
    return row[-1]
