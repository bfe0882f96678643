"""Score an answer against its reference.

All scores are within 0 to 1 except `length`; higher is better except for `refusal`. `evaluate.metrics` says
which are computed; `ratchet/evaluation/custom_metrics.py` adds the user's own. Metrics that need many rows
are at the end of this file.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ratchet.config.evaluation import EvaluateConfig
from ratchet.data.examples import call_text, calls_in
from ratchet.data.text import REFUSAL
from ratchet.data.words import words_of
from ratchet.evaluation.statistics import Interval, Values

Metric = Callable[[str, str], float]
NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d{1,300})(?:\.\d{1,300})?(?:[eE][-+]?\d{1,3})?")
NO_JSON = object()
TOLERANCE = 1e-6  # relative difference of numbers that count as equal
MIN_ROWS = 5  # rows that a reference needs to count as a label
MARKED_NUMBER = re.compile(r"####\s*[-+$]?[\d.,]+\s*$")  # as GSM8K's answers end
NEARLY_ALL, SOME_CALLS, LONG_TEXT = (
    0.9,
    0.2,
    12,
)  # the first two are shares of the answers, the last counts words


def exact_match(answer: str, reference: str) -> float:
    """Return 1 when both are equal except for blanks, else 0."""
    return float(" ".join(answer.split()) == " ".join(reference.split()))


def token_f1(answer: str, reference: str) -> float:
    """Score F1 over words, as multisets, lower case (SQuAD, arXiv 1606.05250).

    SQuAD's removal of articles is left out. Without words on both sides: exact match.
    """
    return _overlap(answer, reference, size=1)


def rouge_1(answer: str, reference: str) -> float:
    """Score ROUGE-N with N = 1 as F1 (Lin 2004, W04-1013), without stemming: the same as `token_f1`."""
    return _overlap(answer, reference, size=1)


def rouge_2(answer: str, reference: str) -> float:
    """Score F1 over pairs of neighbouring words, as multisets, lower case (Lin 2004).

    Without pairs on both sides: exact match.
    """
    return _overlap(answer, reference, size=2)


def rouge_l(answer: str, reference: str) -> float:
    """Score F1 of the longest common subsequence of words, lower case (Lin 2004, W04-1013).

    Without words on both sides: exact match.
    """
    left, right = words_of(answer), words_of(reference)
    longest = _longest_common(left, right)
    if not longest:
        return exact_match(answer, reference) if not left and not right else 0.0
    return 2 * longest / (len(left) + len(right))


def bleu(answer: str, reference: str) -> float:
    """Score sentence BLEU by sacrebleu, effective order, divided by 100 (Papineni et al. 2002, P02-1040).

    When either side is without text: exact match.
    """
    from sacrebleu import sentence_bleu

    if not answer.strip() or not reference.strip():
        return exact_match(answer, reference)
    return min(1.0, float(sentence_bleu(answer, [reference]).score) / 100)


def chrf(answer: str, reference: str) -> float:
    """Score chrF2 by sacrebleu, divided by 100 (Popović 2015, W15-3049)."""
    from sacrebleu import sentence_chrf

    return float(sentence_chrf(answer, [reference]).score) / 100


def accuracy(answer: str, reference: str) -> float:
    """Return 1 when both are the same label, else 0: equal except for case, blanks and punctuation at the
    end.
    """
    return float(as_label(answer) == as_label(reference))


def json_valid(answer: str, reference: str) -> float:
    """Return 1 when the answer is one JSON value (RFC 8259: no NaN, no comment), else 0.

    The reference is not used.
    """
    return float(_parse(answer) is not NO_JSON)


def json_fields(answer: str, reference: str) -> float:
    """Return the share of the fields of both objects that both have, with the same value.

    Fields are those of the outermost object. A reference that is no object has one field, itself; one that is
    no JSON is compared as text.
    """
    wanted, found = _parse(reference), _parse(answer)
    if wanted is NO_JSON:
        return exact_match(answer, reference)
    if not isinstance(wanted, dict) or not isinstance(found, dict):
        return float(found is not NO_JSON and _canonical(found) == _canonical(wanted))
    fields = wanted.keys() | found.keys()
    same = sum(
        key in wanted and key in found and _canonical(wanted[key]) == _canonical(found[key]) for key in fields
    )
    return same / len(fields) if fields else 1.0


def _parse(text: str) -> Any:
    """Read one JSON value; NO_JSON where the text is none."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return NO_JSON


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def numeric_match(answer: str, reference: str) -> float:
    """Return 1 when the last numbers of both are the same, within a relative 1e-6, else 0.

    This is GSM8K's rule (arXiv 2110.14168). Without a number in the reference: exact match.
    """
    wanted, found = last_number(reference), last_number(answer)
    if wanted is None:
        return exact_match(answer, reference)
    return float(found is not None and math.isclose(found, wanted, rel_tol=TOLERANCE, abs_tol=1e-12))


def tool_decision(answer: str, reference: str) -> float:
    """Return 1 when the answer calls a tool exactly where the reference does, else 0."""
    return float(bool(calls_in(answer)) == bool(calls_in(reference)))


def tool_name(answer: str, reference: str) -> float:
    """Return 1 when both call the same tools, in any order, else 0; none on both sides is the same."""
    said, wanted = (sorted(call.name for call in calls_in(text)) for text in (answer, reference))
    return float(said == wanted)


def tool_arguments(answer: str, reference: str) -> float:
    """Return 1 when both make the same calls with the same arguments, in any order, else 0."""
    said, wanted = (sorted(map(call_text, calls_in(text))) for text in (answer, reference))
    return float(said == wanted)


def refusal(answer: str, reference: str) -> float:
    """Return 1 when the answer begins like a refusal in English, else 0; the mean is the refusal rate.

    The reference is not used.
    """
    return float(REFUSAL.match(answer) is not None)


def length(answer: str, reference: str) -> float:
    """Count the words of the answer."""
    return float(len(words_of(answer)))


ROW_METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "token_f1": token_f1,
    "rouge_1": rouge_1,
    "rouge_2": rouge_2,
    "rouge_l": rouge_l,
    "bleu": bleu,
    "chrf": chrf,
    "accuracy": accuracy,
    "json_valid": json_valid,
    "json_fields": json_fields,
    "numeric_match": numeric_match,
    "tool_decision": tool_decision,
    "tool_name": tool_name,
    "tool_arguments": tool_arguments,
    "refusal": refusal,
    "length": length,
}


def row_metrics(config: EvaluateConfig) -> dict[str, Metric]:
    """Return those of `evaluate.metrics` that score single rows; exact match is always among them."""
    known = {**ROW_METRICS, "regex_match": regex_match(config.pattern)}
    return {name: known[name] for name in dict.fromkeys(("exact_match", *config.metrics)) if name in known}


def regex_match(pattern: str) -> Metric:
    """Make a metric that is 1 when the whole answer, without surrounding blanks, matches `pattern`, else 0.

    A dot in the pattern also matches line ends.
    """
    compiled = re.compile(pattern, re.DOTALL)
    return lambda answer, reference: float(compiled.fullmatch(answer.strip()) is not None)


def as_label(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".!?;:, ")


def last_number(text: str) -> float | None:
    """Return the last number of a text; None when there is none, or when it is too large for a float.

    `1,250.5` is one number.
    """
    found = NUMBER.findall(text)
    value = float(found[-1].replace(",", "")) if found else math.nan
    return value if math.isfinite(value) else None


def _overlap(answer: str, reference: str, *, size: int) -> float:
    left, right = _runs(words_of(answer), size), _runs(words_of(reference), size)
    common = sum((left & right).values())
    if not common:
        return exact_match(answer, reference) if not left and not right else 0.0
    precision, recall = common / sum(left.values()), common / sum(right.values())
    return 2 * precision * recall / (precision + recall)


def _runs(words: Sequence[str], size: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[start : start + size]) for start in range(len(words) - size + 1))


def _longest_common(left: list[str], right: list[str]) -> int:
    row = [0] * (len(right) + 1)
    for word in left:
        diagonal = 0
        for position, other in enumerate(right, start=1):
            diagonal, row[position] = (
                row[position],
                diagonal + 1 if word == other else max(row[position], row[position - 1]),
            )
    return row[-1]


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")


class Proposal(NamedTuple):
    """Metrics that suit answers like these; the first one can be `gate.metric`."""

    metrics: tuple[str, ...]
    why: str


def propose_metrics(references: Sequence[str]) -> Proposal | None:
    """Propose metrics that suit the answers; None without rows.

    Metrics for JSON and numbers are proposed when nearly all answers are such, those for tool calls when a
    fifth of the answers are calls. For long texts exact match is not proposed: no model repeats them word by
    word, so it would be 0 for every model.
    """
    if not references:
        return None

    def share(fits: Callable[[str], bool]) -> float:
        return sum(map(fits, references)) / len(references)

    if (calling := share(lambda text: bool(calls_in(text)))) >= SOME_CALLS:
        return Proposal(
            ("tool_arguments", "tool_name", "tool_decision"), f"{calling:.0%} of the answers call tools"
        )
    if (marked := share(lambda text: MARKED_NUMBER.search(text) is not None)) >= NEARLY_ALL:
        return Proposal(("numeric_match",), f"{marked:.0%} of the answers end with #### and a number")
    if (objects := share(_is_json)) >= NEARLY_ALL:
        return Proposal(
            ("exact_match", "json_valid", "json_fields"), f"{objects:.0%} of the answers are JSON"
        )
    if are_labels(references):
        return Proposal(
            ("exact_match", "macro_f1"), f"{len(set(map(as_label, references)))} answers come again and again"
        )
    if (numbers := share(lambda text: NUMBER.fullmatch(text.strip()) is not None)) >= NEARLY_ALL:
        return Proposal(("numeric_match",), f"{numbers:.0%} of the answers are numbers")
    words = sorted(len(words_of(text)) for text in references)[len(references) // 2]
    if words >= LONG_TEXT:
        why = (
            f"half of the answers have {words} words or more, and nobody says those again word by word; "
            "a judge can score them as well (`evaluate.judge`)"
        )
        return Proposal(("rouge_l", "chrf"), why)
    return Proposal(("exact_match", "token_f1"), f"half of the answers have {words} words or fewer")


def _is_json(text: str) -> bool:
    return text.lstrip()[:1] in ("{", "[") and json_valid(text, "") == 1.0


def are_labels(references: Sequence[str]) -> bool:
    """Tell whether the references are labels rather than free text.

    They are labels when at least half of the rows have a reference that occurs five times or more, and there
    is more than one such reference.
    """
    counts = Counter(map(as_label, references))
    common = {label for label, count in counts.items() if count >= MIN_ROWS}
    return len(common) > 1 and sum(counts[label] for label in common) >= len(references) / 2


def macro_f1(
    answers: Sequence[str], references: Sequence[str], *, alpha: float, resamples: int, seed: int
) -> Interval:
    """Return the mean of the F1 scores of all labels that the references contain.

    It equals scikit-learn's `f1_score(average="macro", labels=…)`; the bounds come from the bootstrap over
    rows.
    """
    answered, wanted = list(map(as_label, answers)), list(map(as_label, references))
    labels = {label: place for place, label in enumerate(sorted(set(wanted)))}
    said, true = (_one_hot(side, labels) for side in (answered, wanted))
    rows = len(wanted)
    counts = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), resamples)
    means = _mean_f1(counts @ (said * true), counts @ said, counts @ true)
    low, high = np.quantile(means, [alpha, 1 - alpha])
    mean = float(_mean_f1((said * true).sum(0)[None], said.sum(0)[None], true.sum(0)[None])[0])
    return Interval(mean, min(mean, float(low)), max(mean, float(high)))


def _one_hot(side: list[str], labels: dict[str, int]) -> Values:
    """Encode the labels one-hot, as (rows, labels); a row with an unknown label is all zeros."""
    found = np.zeros((len(side), len(labels)))
    places = [(row, labels[label]) for row, label in enumerate(side) if label in labels]
    found[tuple(np.array(places, dtype=int).reshape(-1, 2).T)] = 1.0
    return found


def _mean_f1(hits: Values, said: Values, true: Values) -> Values:
    """Return the mean F1 of the labels, of shape (draws,), from counts of shape (draws, labels).

    A label that is missing from a draw and from its answers does not count in that draw.
    """
    both = said + true
    score = np.divide(2 * hits, both, out=np.zeros_like(both), where=both > 0)
    return np.asarray(score.sum(1) / np.maximum(1, (both > 0).sum(1)), dtype=np.float64)
