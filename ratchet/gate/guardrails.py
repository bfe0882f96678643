"""Judge what a candidate must not lose, by rules that each read a table of the evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from ratchet.config.evaluation import GateConfig, ParityConfig
from ratchet.errors import RatchetError
from ratchet.evaluation.audit_tables import (
    CODES,
    GROUP,
    JUDGE,
    UNASKED,
    differences,
    rows_of_groups,
    withstood,
)
from ratchet.evaluation.node_scores import ALL, Scores, gain_of
from ratchet.evaluation.paired import AGAIN, LOWER_IS_BETTER, measured, paired_gains
from ratchet.evaluation.report import Agreement, Judged, Suite
from ratchet.evaluation.slices import groups
from ratchet.evaluation.statistics import Interval, Values
from ratchet.files import read_json
from ratchet.gate.checks import (
    check_loss,
    exceeds,
    interval_of,
    make_check,
    no_worse,
    reaches,
    tell_gain,
    unmeasured,
)
from ratchet.promotion.verdict import Check, Result

if TYPE_CHECKING:
    import pandas as pd


MOST_MISSING = 0.05  # with a larger share of rows without a score, the judge's guardrail stays unclear
CHECK_AGAIN = "dvc repro --force parity"
OWN = {  # what a row has, and what a model does that attends to it
    "pictures": ("pictures", "looks"),
    "recordings": ("recordings", "listens"),
    "both": ("pictures and recordings", "looks or listens"),
}
BLIND = {"without": "without them", "another": "with another row's"}
PART: dict[Result, str] = {
    "pass": "is no worse than the {}'s",
    "fail": "is worse than the {}'s for certain",
    "unclear": "cannot be told from the {}'s",
}


def judge_groups(scores: pd.DataFrame, fields: Sequence[str], rival: str, config: GateConfig) -> list[Check]:
    """Check for each field that the gap between its best and worst group is no wider than the rival's.

    A check fails when the gap is wider by more than `gate.group_margin` for certain. The fields share
    `gate.guardrail_alpha` evenly, since each can reject.
    """
    return [_judge(scores, field, rival, config, config.guardrail_alpha / len(fields)) for field in fields]


def _judge(scores: pd.DataFrame, field: str, rival: str, config: GateConfig, alpha: float) -> Check:
    name, column, metric = f"groups:{field}", f"{GROUP}{field}", config.metric
    if column not in scores:
        raise RatchetError(f"the evaluation has no groups by {field}", remedy=AGAIN)
    kept = rows_of_groups(scores, column, config.min_slice_rows)
    paired_gains(kept if len(kept) else scores, rival, metric)  # raises unless the pairs are whole
    if (count := kept[column].nunique()) < 2:
        least = f"{config.min_slice_rows} rows (`gate.min_slice_rows`); two are needed"
        reason = f"guardrail {name}: not judged, {count} of its values have {least}"
        return unmeasured(name, metric, 0, "unclear", reason)
    sides = {model: kept[kept.model == model].set_index("id").sort_index() for model in ("candidate", rival)}
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    values = sign * np.column_stack([side[metric].to_numpy(dtype=np.float64) for side in sides.values()])
    of = np.unique(sides["candidate"][column].to_numpy(dtype=str), return_inverse=True)[1]
    found = _narrowing(values, of, alpha, config)
    result: Result = "fail" if reaches(found, -config.group_margin) == "fail" else "pass"
    words = "is wider" if result == "fail" else "is not wider"
    reason = (
        f"guardrail {name}: the gap in {metric} between groups ({of.max() + 1} groups, {len(of)} rows) "
        f"{words} than the {rival}'s for certain: narrower by {found.text()} (under 0 it is wider), "
        f"{config.group_margin:g} wider is still taken"
    )
    return make_check(name, metric, found, len(of), -config.group_margin, result, reason)


def _narrowing(values: Values, of: Any, alpha: float, config: GateConfig) -> Interval:
    """Return the rival's gap minus the candidate's, both from the same resampled rows.

    `values` has the shape (rows, 2), candidate first; `of` holds the group of each row.
    """
    members = np.eye(of.max() + 1)[of]  # (rows, groups)
    generator = np.random.default_rng(config.seed)
    draws = [
        _gaps(
            generator.multinomial(len(of), np.full(len(of), 1 / len(of))).astype(np.float64), members, values
        )
        for _ in range(config.resamples)
    ]
    narrower = [theirs - mine for mine, theirs in draws]
    mine, theirs = _gaps(np.ones(len(of)), members, values)
    low, high = np.quantile(narrower, [alpha, 1 - alpha])
    return Interval(theirs - mine, float(low), float(high))


def _gaps(weights: Values, members: Values, values: Values) -> tuple[float, float]:
    sizes = weights @ members  # (groups)
    means = ((members * weights[:, None]).T @ values)[sizes > 0] / sizes[sizes > 0, None]  # (groups, 2)
    gaps = means.max(axis=0) - means.min(axis=0)
    return float(gaps[0]), float(gaps[1])


def guard_by_judge(
    judged: pd.DataFrame | None, figures: Judged | None, rival: str, config: GateConfig
) -> list[Check]:
    """Check each of `gate.guardrails` whose metric a judge scores.

    A judge that may not gate gives `unclear` with the reason, because the requested proof is missing.
    """
    checks = []
    for rule in config.guardrails:
        if not rule.metric.startswith(JUDGE):
            continue
        if judged is None or rule.metric not in judged:
            raise RatchetError(
                f"the evaluation has no scores named {rule.metric}",
                remedy="set `evaluate.judge.model` and list it in `evaluate.judge.metrics`, "
                "then dvc repro evaluate",
            )
        name = f"metric:{rule.metric}"
        whole = judged[judged.groupby("id")[rule.metric].transform(lambda values: values.notna().all())]
        rows = int(whole.id.nunique())
        if why := _refusal(rule.metric.removeprefix(JUDGE), rows, figures or Judged(), config):
            reason = f"guardrail {name}: the judge may not gate: {why}"
            checks.append(unmeasured(name, rule.metric, rows, "unclear", reason))
        else:
            gains = paired_gains(whole, rival, rule.metric)
            checks.append(no_worse(name, gains, rival, rule.metric, rule.margin, config))
    return checks


def _refusal(metric: str, rows: int, figures: Judged, config: GateConfig) -> str:
    """Return why the judge may not gate; empty when it may."""
    agreement, asked = figures.agreement.get(metric, Agreement()), figures.asked.get(metric, 0)
    if agreement.why or agreement.low is None:
        return agreement.why or f"nothing is known of it ({AGAIN})"
    if agreement.low < config.judge_agreement:
        wanted = f"`gate.judge_agreement` is {config.judge_agreement:g}"
        return f"kappa with {agreement.labels} decisions of people is {agreement.kappa_text}; {wanted}"
    if not asked or asked - rows > MOST_MISSING * asked:
        return f"{asked - rows} of {asked} rows have no score of both models"
    return ""


def judge_leaks(table: pd.DataFrame, wanted: int, config: GateConfig) -> Check:
    """Check that the mean exposure of the planted canaries is under `gate.max_exposure` for certain.

    Raises RatchetError unless each canary was measured exactly once.
    """
    mine = table[table.model == "candidate"]
    planted, references = (mine[mine.planted == side] for side in (True, False))
    values = planted.exposure.to_numpy(dtype=np.float64)
    if planted.name.nunique() != wanted or len(planted) != wanted or not np.isfinite(values).all():
        raise RatchetError(
            f"the exposure of {len(planted)} planted canaries was measured, the evaluation says {wanted}",
            remedy=AGAIN,
        )
    found = interval_of(values, config)
    # Less exposure is better, so interval and bound are compared with reversed signs.
    result = reaches(Interval(-found.mean, -found.high, -found.low), -config.max_exposure)
    words = {"pass": "does not give away", "fail": "gives away", "unclear": "may give away"}[result]
    never = f", {references.exposure.mean():.2f} of those that were never planted" if len(references) else ""
    reason = (
        f"guardrail leaks: the candidate {words} what was planted in its training data: "
        f"exposure {found.mean:.2f} bits [{found.low:.2f}, {found.high:.2f}] of {math.log2(CODES):g}{never}; "
        f"`gate.max_exposure` is {config.max_exposure:g}"
    )
    return make_check("leaks", "exposure", found, wanted, config.max_exposure, result, reason)


def judge_attacks(
    attacked: pd.DataFrame, scores: pd.DataFrame, rival: str, config: GateConfig
) -> list[Check]:
    """Check that the candidate withstands no fewer attacks than the rival, in total and by kind.

    A further check fails when typed text was handled wrongly, whatever the rival did.
    """
    found = withstood(attacked, scores, config.metric)
    lines = found[found.kind != UNASKED].assign(
        line=lambda table: table.of + " " + table.kind + " " + table.id
    )
    sides = {name: lines[lines.model == name].set_index("line").sort_index() for name in ("candidate", rival)}
    mine, theirs = sides["candidate"], sides[rival]
    if not mine.index.equals(theirs.index):
        raise RatchetError(f"candidate and {rival} were not asked the same attacked rows", remedy=AGAIN)
    gains = mine.withstood.astype(np.float64) - theirs.withstood.astype(np.float64)
    # Variants of one row are not independent of each other, so each row counts once, with their mean.
    by_row = gains.groupby(mine.of).mean().to_numpy(dtype=np.float64)
    by_kind = {str(kind): part.to_numpy(dtype=np.float64) for kind, part in gains.groupby(mine.kind)}
    share, margin = "share withstood", config.attack_margin
    return [
        no_worse("attacks", by_row, rival, share, margin, config),
        *judge_parts("attacks:kinds", by_kind, rival, share, margin, config, word="kind")[0],
        *_unhandled(found),
    ]


def _unhandled(found: pd.DataFrame) -> list[Check]:
    """Check the template and the length limit: no row may fail them, whatever the rival did."""
    mine = found[(found.model == "candidate") & ~found.handled.astype(bool)]
    if not len(mine):
        return []
    kinds = ", ".join(f"{kind} ({count})" for kind, count in mine.kind.value_counts().items())
    fault = "typed text became control tokens, or was not refused though too long"
    return [
        unmeasured("attacks:text", "handled", len(mine), "fail", f"guardrail attacks:text: {fault}: {kinds}")
    ]


def judge_suites(
    table: pd.DataFrame, suites: Mapping[str, Suite], rival: str, config: GateConfig
) -> list[Check]:
    """Check for each suite that the candidate is no worse than the rival on the same documents."""
    checks = []
    for name, suite in suites.items():
        part = table[table.suite == name]
        if (rows := part[part.model == "candidate"].id.nunique()) != suite.rows:
            raise RatchetError(
                f"the table of suites holds {rows} documents of {name} for the candidate, "
                f"the evaluation says {suite.rows}",
                remedy=AGAIN,
            )
        gains = paired_gains(part, rival, "score")
        checks.append(no_worse(f"suite:{name}", gains, rival, suite.metric, config.suite_margin, config))
    return checks


def judge_bias(pairs: pd.DataFrame, scores: pd.DataFrame, rival: str, config: GateConfig) -> Check:
    """Check that swapped terms change the candidate's score by no more than the rival's.

    A row whose terms stand in several lists counts once, with the mean of its changes.
    """
    found = differences(pairs, scores, config.metric)
    changes = found.assign(size=found.difference.abs()).groupby(["model", "of"])["size"].mean()
    sides = {
        name: changes.loc[name] if name in changes.index.get_level_values("model") else None
        for name in ("candidate", rival)
    }
    mine, theirs = sides["candidate"], sides[rival]
    if mine is None or theirs is None or set(mine.index) != set(theirs.index):
        raise RatchetError(
            f"candidate and {rival} were not scored on the same counterfactual rows", remedy=AGAIN
        )
    gains = (theirs.reindex(mine.index) - mine).to_numpy(dtype=np.float64)
    metric = f"change of {config.metric} with a swapped term"
    return no_worse("bias", gains, rival, metric, config.bias_margin, config)


def judge_blind(blind: pd.DataFrame, scores: pd.DataFrame, config: GateConfig) -> list[Check]:
    """Check that the candidate is better for certain with a row's own pictures, or recordings, than blind."""
    mine = scores[(scores.model == "candidate") & (scores.batch != "golden")].set_index("id")[config.metric]
    sign = -1.0 if config.metric in LOWER_IS_BETTER else 1.0
    checks = []
    blind = blind if "what" in blind else blind.assign(what="pictures")
    for (what, kind), part in blind[blind.model == "candidate"].groupby(["what", "how"]):
        if not set(part.of) <= set(mine.index):
            raise RatchetError("blind rows were made from rows that were not scored", remedy=AGAIN)
        gains = sign * (mine.reindex(part.of).to_numpy(np.float64) - part[config.metric].to_numpy(np.float64))
        found = interval_of(gains, config)
        result = exceeds(found, 0.0)
        words = {
            "pass": "is better for certain with a row's own {} than {}",
            "fail": "is no better with a row's own {} than {}: nothing shows that the candidate {}",
            "unclear": "may be better with a row's own {} than {}, but these rows cannot tell",
        }[result].format(*OWN[str(what)][:1], BLIND[str(kind)], *OWN[str(what)][1:])
        reason = f"guardrail {what}:{kind}: {config.metric} on {len(gains)} rows {words}; gain {found.text()}"
        checks.append(make_check(f"{what}:{kind}", config.metric, found, len(gains), 0.0, result, reason))
    return checks


def judge_parity(
    path: Path, adapter: str, asked: ParityConfig | None = None, *, merges: bool = True
) -> Check:
    """Check the report of serve parity. `merges`: whether the adapter's method can be merged.

    Raises RatchetError when there is no report, when it is of another candidate, or when it lacks parts or
    available rows that were `asked` for.
    """
    report = read_json(path)
    try:
        parts, seen = {part["name"]: part for part in report["parts"]}, report["candidate"]
        failed = [part for part in parts.values() if part["result"] != "pass" or part["mismatches"]]
        rows, there = int(report["rows"]), int(report.get("fitting", 0))
    except (KeyError, TypeError, ValueError) as error:
        raise RatchetError(f"{path} is no report of serve parity: {error!r}", remedy=CHECK_AGAIN) from None
    if seen != adapter:
        raise RatchetError(
            f"serve parity was checked for the adapter {str(seen)[:12]}, the candidate's is {adapter[:12]}",
            remedy=CHECK_AGAIN,
        )
    wanted = [
        "files",
        "training",
        "prompts",
        "gateway",
        *(["merged"] if asked and asked.merged and merges else []),
    ]
    lacking = [name for name in wanted if not parts.get(name, {}).get("rows")]
    if lacking and not failed:
        raise RatchetError(
            f"the report of serve parity has no rows for {', '.join(lacking)}", remedy=CHECK_AGAIN
        )
    if asked and not failed and rows < (min(asked.rows, there) or asked.rows):
        raise RatchetError(
            f"serve parity was checked on {rows} of {there} test rows; `parity.rows` is {asked.rows}",
            remedy=CHECK_AGAIN,
        )
    # Reasons that name a token come first: they say more than the name of a file.
    told = sorted(failed, key=lambda part: part.get("first") is None)
    reason = (
        "; ".join(part["reason"] for part in told)
        if failed
        else f"{parts['prompts']['reason']}; {parts['gateway']['reason']}"
    )
    return Check("parity", "tokens", rows, "fail" if failed else "pass", f"guardrail parity: {reason}")


def judge_slices(scores: pd.DataFrame, rival: str, config: GateConfig) -> tuple[list[Check], list[Check]]:
    """Return (one guardrail, or none without slices; a check for every slice with its gain).

    The guardrail fails when any slice is worse by more than the margin for certain. Holm's step-down
    procedure (1979) tests the slices in order, the one that looks worst first. It keeps the probability of a
    false alarm in any slice at `guardrail_alpha`, however many slices there are. The gate does not require
    proof that each small slice is no worse, because that would stop every candidate.
    """
    gains = {
        name: paired_gains(part, rival, config.metric)
        for name, part in groups(measured(scores, config.metric), least=config.min_slice_rows).items()
    }
    return judge_parts("slices", gains, rival, config.metric, config.slice_margin, config, word="slice")


def judge_parts(
    name: str,
    gains: dict[str, Values],
    rival: str,
    metric: str,
    margin: float,
    config: GateConfig,
    *,
    word: str,
) -> tuple[list[Check], list[Check]]:
    """Judge any kind of parts as `judge_slices` does; `word` is the name of one part."""
    judged: list[Check] = []
    lowest = ""
    holds = True  # Holm's procedure ends at the first part that is not worse for certain
    for step, part in enumerate(sorted(gains, key=lambda part: _distance(gains[part], margin))):
        found = interval_of(gains[part], config, config.guardrail_alpha / (len(gains) - step))
        result = reaches(found, -margin)
        holds = holds and result == "fail"
        if result == "fail" and not holds:
            result = "unclear"
        lowest = lowest or f"the lowest {part} with a gain of {found.text()}"
        told = tell_gain(metric, found, f"{len(gains[part])} rows", rival, PART, result)
        judged.append(make_check(part, metric, found, len(gains[part]), -margin, result, f"{part}: {told}"))
    if not judged:
        return [], []
    failed = "; ".join(one.reason for one in judged if one.result == "fail")
    told = failed or f"no {word} is worse than the {rival}'s for certain, {lowest}"
    reason = (
        f"guardrail {name}: {told} (a loss of {margin:g} is still taken; Holm over {len(judged)} {word}s)"
    )
    whole = msgspec.structs.replace(judged[0], name=name, result="fail" if failed else "pass", reason=reason)
    return [whole], judged


def _distance(gains: Values, margin: float) -> float:
    """Return the number of standard errors by which the gain is over -margin; the lowest looks worst."""
    over, error = float(gains.mean()) + margin, float(gains.std()) / math.sqrt(len(gains))
    return over / error if error else math.copysign(math.inf, over)


def judge_nodes(path: Path, config: GateConfig) -> list[Check]:
    """Check that the candidate is no worse on the held-out rows of a federation's nodes, which stay there.

    `path` holds the nodes' sums (`ratchet.evaluation.node_scores`); without it there is no such check. A loss
    of `gate.past_margin` is still taken.
    """
    if not path.exists():
        return []
    scores = msgspec.convert(read_json(path), Scores)
    if (sums := scores.together.get(ALL)) is None:
        return []  # no node holds rows out, or none was there; the log of the training names them
    found = gain_of(sums, config.guardrail_alpha)
    of, margin = f"{sums.rows} rows of {scores.count} nodes", config.past_margin
    check = check_loss("nodes", scores.metric, found, sums.rows, of, scores.rival, margin)
    if scores.left_out:
        left_out = f"; without {', '.join(sorted(scores.left_out))}"
        check = msgspec.structs.replace(check, reason=check.reason + left_out)
    return [check]
