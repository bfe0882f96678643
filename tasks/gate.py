"""The gate: may the candidate take the champion's place? promote / reject / uncertain, with every reason.

    python -m tasks.gate --prepared data/prepared --evaluation reports/evaluation --candidate models/candidate --incumbent models/incumbent --parity reports/parity.json --looks reports/looks.json --training reports/train --out reports/gate.json

A success metric has to be better for certain, every guardrail has to be no worse for certain (Miller, arXiv 2411.00640:
paired differences on the same rows). What the rows cannot tell is `uncertain`, and the champion stays. A missing, partial
or duplicated evaluation fails.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from ratchet.config.evaluation import GateConfig, ParityConfig
from ratchet.config.params import Config
from ratchet.data.examples import read_examples
from ratchet.errors import RatchetError
from ratchet.evaluation.audit_tables import JUDGE
from ratchet.evaluation.paired import AGAIN, SEEN_SHARE, make_check, no_worse, paired_gains, said
from ratchet.evaluation.statistics import bootstrap_mean, chance_of
from ratchet.files import read_json, write_json
from ratchet.gate.alpha_budget import alpha_of, look_number, read_looks
from ratchet.gate.guardrails import (
    guard_by_judge,
    judge_attacks,
    judge_bias,
    judge_groups,
    judge_leaks,
    judge_parity,
    judge_slices,
    judge_suites,
)
from ratchet.gate.payoff import training_seconds, weigh
from ratchet.models.adapters import PREFIXED
from ratchet.models.loading import MANIFEST
from ratchet.monitoring.topics import parts
from ratchet.pipeline.stage import run_stage, say
from ratchet.reporting.markdown import speed_line

Verdict = Literal["promote", "reject", "uncertain"]


def judge(
    evaluation: Path,
    candidate: Path,
    incumbent: Path,
    parity: Path,
    looks: Path,
    out: Path,
    config: GateConfig,
    training: Path | None = None,
    *,
    prepared: Path | None = None,
    parity_asked: ParityConfig | None = None,
) -> dict[str, Any]:
    """Returns the decision and writes it. `training` holds the figures of the run, for `gate.worth`.

    Raises RatchetError when the evaluation or the report of serve parity is not whole: against themselves, and where they are given against the rows of `prepared` and what `parity_asked` for.
    """
    metrics = read_json(evaluation / "metrics.json")
    champion = read_json(incumbent / MANIFEST)
    if metrics["champion"] != champion["version"]:
        raise RatchetError(
            f"the evaluation is against v{metrics['champion']}, the incumbent is v{champion['version']}",
            remedy="ratchet retrain --force",
        )
    manifest = read_json(candidate / MANIFEST)
    scores = _whole_scores(evaluation, metrics, manifest["adapter_sha256"])
    _check_range(scores, config)
    if prepared:
        _check_rows(scores, prepared)
    rival = "base" if champion["version"] is None else "champion"
    look = look_number(read_looks(looks), champion["version"], manifest["run_key"])
    slice_checks, slices = judge_slices(scores[scores.batch != "golden"], rival, config)
    checks = [
        _success(scores, rival, alpha_of(look, config), look, config),
        *_guardrails(scores, rival, champion["batches"], config),
        *slice_checks,
    ]
    if config.oldest and champion.get("oldest") is not None:
        checks += _oldest(scores, _read_table(incumbent / "oldest.parquet"), f"v{champion['oldest']}", config)
    checks += _audits(evaluation, metrics, scores, rival, config)
    merges = manifest.get("adapter", {}).get("method") not in PREFIXED
    checks.append(judge_parity(parity, manifest["adapter_sha256"], parity_asked, merges=merges))
    worth = _worth(scores, rival, training, manifest["run_key"], config)
    checks += worth if config.require_worth else []
    verdict: Verdict = (
        "reject"
        if any(check["result"] == "fail" for check in checks)
        else "uncertain"
        if any(check["result"] == "unclear" for check in checks)
        else "promote"
    )
    decision = {
        "verdict": verdict,
        "reasons": [check["reason"] for check in checks if check["result"] != "pass"]
        or [check["reason"] for check in checks],
        "rival": {"model": rival, "version": champion["version"]},
        "checks": checks,
        "regions": [
            _region(name, rows, rival, config)
            for name, rows in parts(scores[scores.batch != "golden"]).items()
        ],
        "slices": slices,
        "worth": worth[0] if worth else None,
        "speed": read_json(parity).get("speed"),
        "look": {"number": look, "alpha": alpha_of(look, config)},
        "candidate": {"run_key": manifest["run_key"], "adapter_sha256": manifest["adapter_sha256"]},
        "params": config.model_dump(mode="json"),
    }
    write_json(out, decision)
    return decision


def _audits(
    evaluation: Path, metrics: dict[str, Any], scores: pd.DataFrame, rival: str, config: GateConfig
) -> list[dict[str, Any]]:
    """Guardrails of what the evaluation was asked for beside the plain rows; `metrics` says what that was, so that a missing table fails."""
    test = scores[scores.batch != "golden"]
    checks = judge_groups(test, metrics.get("grouped", []), rival, config)
    if metrics.get("pairs"):
        checks.append(
            judge_bias(
                _whole_part(evaluation, "counterfactual", metrics["pairs"], "counterfactual"),
                scores,
                rival,
                config,
            )
        )
    if metrics.get("attacked"):
        checks += judge_attacks(
            _whole_part(evaluation, "attacks", metrics["attacked"], "attacked"), scores, rival, config
        )
    if metrics.get("canaries"):
        checks.append(judge_leaks(_read_table(evaluation / "canaries.parquet"), metrics["canaries"], config))
    if metrics.get("suites"):
        checks += judge_suites(_read_table(evaluation / "suites.parquet"), metrics["suites"], rival, config)
    judged = _read_table(evaluation / "judged.parquet") if metrics.get("judge") else None
    return [*checks, *guard_by_judge(judged, metrics.get("judge", {}), rival, config)]


def _worth(
    scores: pd.DataFrame, rival: str, training: Path | None, run_key: str, config: GateConfig
) -> list[dict[str, Any]]:
    if not config.worth.given:
        return []
    if training is None:
        raise RatchetError(
            "`gate.worth` needs the figures of the training", remedy="name their folder with --training"
        )
    return [weigh(scores[scores.batch != "golden"], rival, training_seconds(training, run_key), config)]


def _whole_scores(evaluation: Path, metrics: dict[str, Any], adapter: str) -> pd.DataFrame:
    """Raises RatchetError: no table, one of another candidate, or one that lacks rows for candidate and rival alike."""
    if metrics.get("candidate") != adapter:
        raise RatchetError(
            f"the evaluation is of the adapter {str(metrics.get('candidate'))[:12]}, the candidate's is {adapter[:12]}",
            remedy=AGAIN,
        )
    scores = _read_table(evaluation / "scores.parquet")
    if (rows := scores[scores.model == "candidate"].id.nunique()) != metrics.get("rows"):
        raise RatchetError(
            f"the table of scores holds {rows} rows of the candidate, the evaluation says {metrics.get('rows')}",
            remedy=AGAIN,
        )
    return scores


def _check_rows(scores: pd.DataFrame, prepared: Path) -> None:
    """Raises RatchetError: rows that wait to be asked were not. The evaluation leaves out the few test rows that the demo's base has read, and no golden one."""
    asked = set(scores[scores.model == "candidate"].id)
    ids = {name: [row.id for row in read_examples(prepared / f"{name}.jsonl")] for name in ("golden", "test")}
    for name, most in (("golden", 0.0), ("test", SEEN_SHARE * sum(map(len, ids.values())))):
        if (missing := sum(id not in asked for id in ids[name])) > most:
            raise RatchetError(
                f"the evaluation lacks {missing} of {len(ids[name])} {name} rows", remedy=AGAIN
            )


def _check_range(scores: pd.DataFrame, config: GateConfig) -> None:
    """Raises RatchetError: a share outside 0 to 1 is no score."""
    for metric in {config.metric, *(rule.metric for rule in config.guardrails)} & set(scores) - {
        "answer_nll"
    }:
        odd = scores[(scores[metric] < 0) | (scores[metric] > 1)]
        if len(odd):
            raise RatchetError(f"{metric} of {odd.id.iloc[0]} is outside 0 to 1", remedy=AGAIN)


def _whole_part(evaluation: Path, file: str, wanted: int, word: str) -> pd.DataFrame:
    rows = _read_table(evaluation / f"{file}.parquet")
    if (found := int((rows.model == "candidate").sum())) != wanted:
        raise RatchetError(
            f"the table of {word} rows holds {found} of the candidate, the evaluation says {wanted}",
            remedy=AGAIN,
        )
    return rows


def _read_table(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise RatchetError(f"{path} cannot be read: {' '.join(str(error).split())}", remedy=AGAIN) from None


def _success(scores: pd.DataFrame, rival: str, alpha: float, look: int, config: GateConfig) -> dict[str, Any]:
    """`alpha` is what the budget leaves for this look: thirty candidates that are no better must not get one through by luck."""
    rows = scores[scores.batch != "golden"]
    gains = paired_gains(rows, rival, config.metric)
    if len(gains) < config.min_rows:
        reason = f"{len(gains)} test rows are too few to decide on; `gate.min_rows` is {config.min_rows}"
        return {
            "name": "success",
            "metric": config.metric,
            "rows": len(gains),
            "result": "unclear",
            "reason": reason,
        }
    found = bootstrap_mean(gains, alpha=alpha, resamples=config.resamples, seed=config.seed)
    result = (
        "pass"
        if found.low > config.min_gain and chance_of(gains) <= alpha
        else "fail"
        if found.high <= config.min_gain
        else "unclear"
    )
    words = {
        "pass": "is better for certain than the {}'s",
        "fail": "is not better than the {}'s",
        "unclear": "may be better than the {}'s, but these rows cannot tell",
    }
    reason = f"{config.metric} on {len(gains)} test rows {words[result].format(rival)}: gain {said(found)}, wanted a lower bound over {config.min_gain:+.3f} (look {look} against it, error {alpha:.2g})"
    return make_check("success", config.metric, found, len(gains), config.min_gain, result, reason)


def _guardrails(
    scores: pd.DataFrame, rival: str, seen: list[str], config: GateConfig
) -> list[dict[str, Any]]:
    test, golden = scores[scores.batch != "golden"], scores[scores.batch == "golden"]
    checks = [
        _no_worse("answer_nll", test, rival, "answer_nll", config.nll_margin, config),
        _no_worse("base", test, "base", config.metric, config.past_margin, config),
    ]
    checks += [
        _no_worse(f"metric:{rule.metric}", test, rival, rule.metric, rule.margin, config)
        for rule in config.guardrails
        if not rule.metric.startswith(JUDGE)
    ]
    if len(golden):
        checks.append(_no_worse("golden", golden, rival, config.metric, config.golden_margin, config))
    past = test[test.batch.isin(seen)]
    if rival == "champion" and len(past):
        checks.append(_no_worse("past", past, rival, config.metric, config.past_margin, config))
        for batch, rows in past.groupby("batch"):
            if past.batch.nunique() > 1 and rows.id.nunique() >= config.min_slice_rows:
                checks.append(
                    _no_worse(f"past:{batch}", rows, rival, config.metric, config.past_margin, config)
                )
    return checks


def _oldest(scores: pd.DataFrame, old: pd.DataFrame, rival: str, config: GateConfig) -> list[dict[str, Any]]:
    """On the rows that both were scored on, years apart. No guardrail when these are too few, or when today's metric was not computed then."""
    mine = scores[(scores.model == "candidate") & scores.id.isin(old.id)]
    if config.metric not in old or mine.id.nunique() < config.min_slice_rows:
        return []
    return [
        _no_worse(
            "oldest",
            pd.concat([mine, old[old.id.isin(mine.id)].assign(model=rival)]),
            rival,
            config.metric,
            config.past_margin,
            config,
        )
    ]


def _no_worse(
    name: str, rows: pd.DataFrame, rival: str, metric: str, margin: float, config: GateConfig
) -> dict[str, Any]:
    return no_worse(name, paired_gains(rows, rival, metric), rival, metric, margin, config)


def _region(name: str, rows: pd.DataFrame, rival: str, config: GateConfig) -> dict[str, Any]:
    """Did the retraining cure the topic that drifted? Said, not decided on: its few rows are among those of the checks above."""
    gains = paired_gains(rows, rival, config.metric)
    found = bootstrap_mean(gains, alpha=config.guardrail_alpha, resamples=config.resamples, seed=config.seed)
    result = "pass" if found.low > 0 else "fail" if found.high <= 0 else "unclear"
    words = {
        "pass": "is better for certain than the {}'s",
        "fail": "is not better than the {}'s",
        "unclear": "may be better than the {}'s, and these rows cannot tell",
    }
    reason = f"drifted topic {name}: {config.metric} on {len(gains)} test rows {words[result].format(rival)}: gain {said(found)}"
    return make_check(f"region:{name}", config.metric, found, len(gains), 0.0, result, reason)


def _main(config: Config, arguments: argparse.Namespace) -> None:
    paths = (
        arguments.evaluation,
        arguments.candidate,
        arguments.incumbent,
        arguments.parity,
        arguments.looks,
        arguments.out,
    )
    decision = judge(
        *paths, config.gate, arguments.training, prepared=arguments.prepared, parity_asked=config.parity
    )
    say(f"gate: {decision['verdict']}")
    for check in decision["checks"]:
        say(f"gate: {check['result']:7} {check['reason']}")
    if decision["speed"]:
        say(f"gate: {speed_line(decision['speed'])}")
    shown = [decision["worth"]] if decision["worth"] and not config.gate.require_worth else []
    for part in [*shown, *decision["regions"], *decision["slices"]]:
        say(f"gate: {part['reason']}")


if __name__ == "__main__":
    run_stage(
        __doc__,
        ["prepared", "evaluation", "candidate", "incumbent", "parity", "looks", "training", "out"],
        _main,
    )
