"""Say a verdict in one sentence that a manager understands; pages, cards and commands begin with it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from msgspec import UNSET

from ratchet.promotion.verdict import Check, Verdict, tell_rows

Quote = Callable[[str], str]

METRICS = {
    "exact_match": "right answers",
    "accuracy": "right answers",
    "macro_f1": "the score for right labels",
    "token_f1": "agreement with the wanted words",
    "rouge_1": "agreement with the wanted words",
    "rouge_2": "agreement with the wanted text",
    "rouge_l": "agreement with the wanted text",
    "bleu": "agreement with the wanted text",
    "chrf": "agreement with the wanted text",
    "json_valid": "answers in valid JSON",
    "json_fields": "right JSON fields",
    "regex_match": "answers in the wanted form",
    "numeric_match": "right numbers",
    "tool_decision": "right choices whether to call a tool",
    "tool_name": "right choices of a tool",
    "tool_arguments": "right tool calls",
    "refusal": "refusals",
    "preference": "preferences for the better answer",
    "answer_nll": "the likelihood of the wanted answers",
    "judge_correctness": "the judge model's marks for correctness",
    "judge_groundedness": "the judge model's marks for keeping to the passage",
    "judge_preference": "the judge model's preference for the candidate",
}
FEWER_IS_BETTER = ("refusal",)
NO_SHARE = ("answer_nll",)  # has no points and no per cent

# Where a candidate can get worse, by the kind of check; {part} is the rest of the check's name.
PLACES = {
    "past": "on what batch {part} taught",
    "golden": "on the golden questions",
    "oldest": "against the first champion",
    "base": "against the untouched base",
    "nodes": "on the rows that stay at the nodes",
    "slices": "on the rows of {part}",
    "suite": "in the public test {part}",
}
EARLIER = "on what earlier batches taught"  # of the check `past`, which has no part

# What a failed check says, and what an unclear one leaves open.
FAULTS = {
    "parity": (
        "what users would get differs from what was tested",
        "users would get what was tested",
    ),
    "privacy": (
        "the privacy that the candidate's training promised does not hold up",
        "the candidate's training kept its promise of privacy",
    ),
    "leaks": (
        "the candidate gives away what was planted in its training data",
        "the candidate gives away its training data",
    ),
    "attacks:text": (
        "typed text was taken for control signs, or was not refused though too long",
        "typed text stays text",
    ),
    "groups": (
        "the gap between the best and the worst group by {part} grew by {loss}",
        "the groups by {part} are treated alike as before",
    ),
    "bias": (
        "swapped names, pronouns and the like change the candidate's answers more than before",
        "swapped names, pronouns and the like change the candidate's answers more than before",
    ),
    "attacks": ("the candidate withstands fewer attacks", "the candidate withstands fewer attacks"),
    "pictures": ("nothing shows that the candidate looks at pictures", "the candidate looks at pictures"),
    "recordings": (
        "nothing shows that the candidate listens to recordings",
        "the candidate listens to recordings",
    ),
    "both": (
        "nothing shows that the candidate uses pictures and recordings",
        "the candidate uses pictures and recordings",
    ),
    "answer_nll": ("the likelihood of the wanted answers fell", "the likelihood of the wanted answers fell"),
    "worth": (
        "the gain is worth {mean}, less than the {wanted} that the training cost",
        "the gain is worth the cost of the training",
    ),
}
# The weightiest first: what makes the figures void or harms people, then losses, then no gain.
WEIGHTS = [
    *("parity", "privacy", "leaks", "attacks:text", "success", "past", "golden", "oldest", "base", "nodes"),
    *("slices", "groups", "bias", "attacks", "suite", "metric", "pictures", "recordings", "both"),
    *("no gain", "answer_nll", "worth"),
]
BATCH = re.compile(r"(\d{4})(\d\d)(\d\d)T\d{6}Z-(.+)-[0-9a-f]{8}\.jsonl")
LONGEST = 60  # characters of a name from the data


def tell_verdict(verdict: Verdict, *, promoted: bool = False, quote: Quote = str) -> str:
    """Return the sentence. `promoted`: the version was in charge at some time.

    The gate lets a candidate pass; a person or a rollout may still decide. So the sentence begins with
    `Promoted` only where the caller knows that it was. `quote` is applied to names that come from data.
    """
    if verdict.verdict == "promote":
        return f"{'Promoted' if promoted else 'Passed'}: {_tell_gain(verdict, quote)}."
    reason = _tell_fault(verdict, quote) if verdict.verdict == "reject" else _tell_doubt(verdict, quote)
    if promoted:
        return f"Promoted although {reason}."
    kept = "Not promoted" if verdict.rival.version is None else f"Kept the champion ({verdict.rival.told})"
    return f"{kept}: {reason}."


def _tell_gain(verdict: Verdict, quote: Quote) -> str:
    success = next((check for check in verdict.checks if check.name == "success"), None)
    others = [check for check in verdict.checks if check is not success]
    if success is None:
        return "every check passed"
    return f"{_tell_success(success, verdict, quote)}{_tell_kept(others, quote)}"


def _tell_kept(others: Sequence[Check], quote: Quote) -> str:
    """Say what became of all that the champion knew: the gate still takes small losses, and they are told."""
    known = [check for check in others if _kind(check) in ("past", "golden", "oldest") and check.gain]
    worst = min(known, key=_mean, default=None)
    if worst is None:
        return ", and every other check passed" if others else ""
    if _mean(worst) >= 0:
        return ", and nothing that it knew got worse"
    return f", and the most that it lost is {_loss(worst)} {_place(worst, quote)}, which is still allowed"


def _tell_fault(verdict: Verdict, quote: Quote) -> str:
    failed = sorted((check for check in verdict.checks if check.result == "fail"), key=_weight)
    if not failed:
        return "a check failed"
    open_ones = sum(check.result == "unclear" for check in verdict.checks)
    return f"{_tell_failed(failed[0], verdict, quote)}{_count(len(failed) - 1, open_ones)}"


def _tell_doubt(verdict: Verdict, quote: Quote) -> str:
    doubts = sorted((check for check in verdict.checks if check.result == "unclear"), key=_weight)
    if not doubts:
        return "the rows cannot tell whether the candidate is better"
    told = f"it cannot be told whether {_whether(doubts[0], verdict, quote)}{_tell_needed(doubts[0])}"
    return told + _count(0, len(doubts) - 1)


def _count(failed: int, open_ones: int) -> str:
    """Count the checks that the sentence does not name."""
    parts = []
    if failed:
        parts.append(f"{failed} other check{'s' * (failed > 1)} failed")
    if open_ones:
        others = "" if failed else f" other check{'s' * (open_ones > 1)}"
        parts.append(f"{open_ones}{others} {'are' if open_ones > 1 else 'is'} unclear")
    return f"; {' and '.join(parts)}" if parts else ""


def _tell_needed(check: Check) -> str:
    rows = {"success": "test", "base": "test", "answer_nll": "test", "golden": "golden"}.get(check.name)
    rows = rows or ("test" if _kind(check) == "metric" else "such")
    if isinstance(check.needed, int):
        if check.gain is None:
            return f"; it takes at least {tell_rows(check.needed)} more {rows} rows"
        return f"; about {tell_rows(check.needed)} more {rows} rows would settle it"
    if check.gain is None:
        return ""
    if check.needed is UNSET:
        return "; how many more rows would settle it is not known"
    return "; more rows would not settle it, with a difference as small as this"


# --- one check ----------------------------------------------------------------------------------------------


def _tell_failed(check: Check, verdict: Verdict, quote: Quote) -> str:
    kind = _kind(check)
    if kind == "success":
        return _tell_success(check, verdict, quote)
    if kind == "slices":
        return _tell_slices(check, verdict, quote)
    if kind in PLACES:
        return f"the candidate lost {_loss(check)} {_place(check, quote)}"
    if kind == "metric":
        verb = "rose" if check.metric in FEWER_IS_BETTER else "fell"
        return f"{_metric(check, quote)} {verb}{f' by {_loss(check)}' if _is_share(check) else ''}"
    failed, _ = FAULTS.get(check.name) or FAULTS.get(kind) or ("the candidate failed the check {name}", "")
    return _fill(failed, check, quote)


def _tell_slices(check: Check, verdict: Verdict, quote: Quote) -> str:
    """Name the slice that lost most; the check itself counts for all of them."""
    failed = sorted((one for one in verdict.slices if one.result == "fail"), key=_mean)
    if not failed:
        return f"the candidate lost {_loss(check)} on some kinds of rows"
    others = len(failed) - 1
    more = f" and on {others} more kind{'s' * (others > 1)} of rows" if others else ""
    place = PLACES["slices"].format(part=_foreign(failed[0].name.replace(":", " "), quote))
    return f"the candidate lost {_loss(failed[0])} {place}{more}"


def _whether(check: Check, verdict: Verdict, quote: Quote) -> str:
    kind = _kind(check)
    if kind == "success":
        better = "fell" if check.metric in FEWER_IS_BETTER else "rose"
        told = f"{_metric(check, quote)} {better}"
        if not check.gain:
            return f"{told}: {check.rows:,} test rows are too few"
        return f"{told}: {_from_to(check, verdict)} on {check.rows:,} test rows may be chance"
    if kind == "metric":
        told = f"{_metric(check, quote)} {'rose' if check.metric in FEWER_IS_BETTER else 'fell'}"
        return told if check.gain else f"{told}: the judge model may not decide yet"
    if kind in PLACES:
        return f"the candidate got worse {_place(check, quote)}"
    _, whether = FAULTS.get(check.name) or FAULTS.get(kind) or ("", "the candidate passes the check {name}")
    few = ": too few rows belong to a group" if kind == "groups" and not check.gain else ""
    return _fill(whether, check, quote) + few


def _tell_success(check: Check, verdict: Verdict, quote: Quote) -> str:
    """Say how the success metric moved, and against what, if that is not the champion."""
    name, mean = _metric(check, quote), _mean(check)
    rows = f"on {check.rows:,} test rows"
    if verdict.rival.version is None and not (mean and _is_share(check) and isinstance(check.score, float)):
        rows += ", compared with the untouched base"
    if not check.gain:
        return f"{name} {'rose' if check.result == 'pass' else 'did not rise'} {rows}"
    if mean == 0:
        return f"{name} did not change {rows}"
    rises = (mean > 0) != (check.metric in FEWER_IS_BETTER)
    told = f"{name} {'rose' if rises else 'fell'} {_from_to(check, verdict, moved=True)}".rstrip()
    wanted = check.wanted if check.result == "fail" and _is_share(check) else None
    short = f", of {_points(wanted)} that are wanted" if isinstance(wanted, float) and mean > 0 else ""
    return f"{told} {rows}{short}"


def _from_to(check: Check, verdict: Verdict, *, moved: bool = False) -> str:
    """Return `from 41 % to 45 %`; where the scores are not known, the difference alone.

    `moved`: a verb stands before it that says in which direction.
    """
    mean, base = _mean(check), " (the untouched base)" if verdict.rival.version is None else ""
    if not _is_share(check):
        return "" if moved else "the difference"
    if not isinstance(check.score, float):
        points = _points(abs(mean))
        return f"by {points}" if moved else f"a {'gain' if mean > 0 else 'loss'} of {points}"
    before = check.score + mean if check.metric in FEWER_IS_BETTER else check.score - mean
    one, two = _percents(before, check.score)
    return f"from {one}{base} to {two}"


def _percents(before: float, now: float) -> tuple[str, str]:
    """Return both with as few decimals as show that they differ, two at most."""
    texts = ("", "")
    for digits in range(3):
        texts = (f"{100 * before:.{digits}f} %", f"{100 * now:.{digits}f} %")
        if texts[0] != texts[1]:
            break
    return texts


def _loss(check: Check) -> str:
    return _points(abs(_mean(check))) if _is_share(check) and check.gain else "ground"


def _points(share: float) -> str:
    points = 100 * share
    text = f"{points:.0f}" if points >= 0.95 else f"{points:.1f}"
    if text == "0.0":
        return "less than 0.1 points"
    return f"{text} point{'s' * (text not in ('1', '1.0'))}"


def _is_share(check: Check) -> bool:
    return check.metric not in NO_SHARE


def _mean(check: Check) -> float:
    return check.gain[0] if check.gain else 0.0


def _kind(check: Check) -> str:
    return check.name.partition(":")[0]


def _weight(check: Check) -> tuple[int, float]:
    """Return the place among the reasons; among equals, the greatest loss comes first."""
    kind = check.name if check.name in WEIGHTS else _kind(check)
    if kind == "success" and check.result == "unclear":
        return -1, 0.0
    if kind == "success" and _mean(check) >= 0:
        kind = "no gain"
    return (WEIGHTS.index(kind) if kind in WEIGHTS else len(WEIGHTS)), _mean(check)


def _place(check: Check, quote: Quote) -> str:
    if check.name == "past":
        return EARLIER
    return _fill(PLACES[_kind(check)], check, quote)


def _fill(words: str, check: Check, quote: Quote) -> str:
    """Fill in the names and figures; a template that has none is returned as it is."""
    figures = {"mean": check.mean, "wanted": check.wanted}
    told = {name: f"{value:,.0f}" if isinstance(value, float) else "?" for name, value in figures.items()}
    part = check.name.partition(":")[2]
    return words.format(
        part=_foreign(part, quote), name=_foreign(check.name, quote), loss=_loss(check), **told
    )


def _metric(check: Check, quote: Quote) -> str:
    return METRICS.get(check.metric) or f"the measure {_foreign(check.metric, quote)}"


def _foreign(name: str, quote: Quote) -> str:
    """Return a name from the data on one line and not too long; a batch is named by its label and date."""
    if found := BATCH.fullmatch(name):
        year, month, day, label = found.groups()
        name = f"{label} of {year}-{month}-{day}"
    words = " ".join("".join(char if char.isprintable() else " " for char in name).split())
    return quote(words if len(words) <= LONGEST else f"{words[: LONGEST - 1]}…")
