"""Decide whether the candidate may take the champion's place, by the rules in `ratchet.gate`.

    python -m tasks.gate --prepared data/prepared --evaluation reports/evaluation \\
        --candidate models/candidate --incumbent models/incumbent --parity reports/parity.json \\
        --looks reports/looks.json --training reports/train --out reports/gate.json

A missing, incomplete or duplicated evaluation is an error, and no verdict is written.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec

from ratchet.config.evaluation import GateConfig, ParityConfig
from ratchet.config.params import Config
from ratchet.data.examples import read_examples
from ratchet.errors import RatchetError
from ratchet.evaluation.node_scores import FILE as NODES
from ratchet.evaluation.report import Metrics, read_metrics
from ratchet.files import read_json, write_json
from ratchet.gate.alpha_budget import alpha_of, look_number, looks_before, read_looks, rows_key
from ratchet.gate.decision import Evidence, Oldest, decide, judge_audits
from ratchet.gate.guardrails import judge_nodes, judge_parity
from ratchet.gate.payoff import training_seconds
from ratchet.gate.privacy import judge_claim, judge_privacy
from ratchet.gate.tables import check_rows, read_scores, read_table
from ratchet.models.adapters import PREFIXED
from ratchet.models.loading import MANIFEST
from ratchet.models.manifests import read_trained_manifest
from ratchet.pipeline.stage import run_stage, say
from ratchet.privacy.audit import FILE as CLAIM
from ratchet.promotion.verdict import Candidate, Check, Look, Rival, Speed, Verdict


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
) -> Verdict:
    """Judge the candidate, write the verdict to `out` and return it.

    `training` is the folder of the run's figures, for `gate.worth`. Raises RatchetError when the evaluation
    or the report of serve parity is incomplete or contradicts itself, or does not match the rows of
    `prepared` and the settings `parity_asked` where these are given.
    """
    evaluated, champion = read_metrics(evaluation), read_json(incumbent / MANIFEST)
    version = champion["version"]
    if evaluated.champion != version:
        raise RatchetError(
            f"the evaluation is against v{evaluated.champion}, the incumbent is v{version}",
            remedy="ratchet retrain --force",
        )
    manifest = read_json(candidate / MANIFEST)
    run_key, adapter = manifest["run_key"], manifest["adapter_sha256"]
    scores = read_scores(evaluation, evaluated, adapter)
    if prepared:
        names = ("golden", "test")
        check_rows(
            scores,
            {name: [row.id for row in read_examples(prepared / f"{name}.jsonl")] for name in names},
            too_long=evaluated.too_long or 0,
        )
    rival = Rival("base" if version is None else "champion", version)
    judged, rows = read_looks(looks), rows_key(scores[scores.model == "candidate"].id)
    number, before = look_number(judged, version, run_key, rows), looks_before(judged, version, run_key, rows)
    look = Look(number, alpha_of(number, config), rows, before)
    # Each further look at one candidate halves the guardrails' error, so that all add up to twice it at most.
    config = config.model_copy(update={"guardrail_alpha": config.guardrail_alpha / 2**before})
    oldest = champion.get("oldest") if config.oldest else None
    together = read_trained_manifest(candidate).federation
    evidence = Evidence(
        scores=scores,
        rival=rival,
        seen=champion["batches"],
        candidate=Candidate(run_key, adapter, together.told if together else ""),
        look=look,
        oldest=None if oldest is None else Oldest(oldest, read_table(incumbent / "oldest.parquet")),
        audits=[
            *judge_audits(evaluation, evaluated, scores, rival.model, config),
            *_judge_privacy(evaluation, evaluated, candidate, config),
            *(_judge_nodes(training, config) if together and training else []),
        ],
        parity=judge_parity(
            parity, adapter, parity_asked, merges=manifest.get("adapter", {}).get("method") not in PREFIXED
        ),
        speed=msgspec.convert(read_json(parity).get("speed"), Speed | None),
        train_seconds=_train_seconds(training, run_key, config),
    )
    verdict = decide(evidence, config)
    write_json(out, msgspec.to_builtins(verdict))
    return verdict


def _judge_privacy(evaluation: Path, evaluated: Metrics, candidate: Path, config: GateConfig) -> list[Check]:
    promise = read_trained_manifest(candidate).privacy
    if promise is None:
        return []
    wanted = evaluated.audit_canaries or 0
    audited = read_table(evaluation / "audit.parquet") if wanted else None
    return [judge_privacy(promise, audited, wanted, config)]


def _judge_nodes(training: Path, config: GateConfig) -> list[Check]:
    return [*judge_claim(training / CLAIM, config), *judge_nodes(training / NODES, config)]


def _train_seconds(training: Path | None, run_key: str, config: GateConfig) -> float | None:
    if not config.worth.given:
        return None
    if training is None:
        raise RatchetError(
            "`gate.worth` needs the figures of the training", remedy="name their folder with --training"
        )
    return training_seconds(training, run_key)


def _main(config: Config, arguments: argparse.Namespace) -> None:
    found = judge(
        arguments.evaluation,
        arguments.candidate,
        arguments.incumbent,
        arguments.parity,
        arguments.looks,
        arguments.out,
        config.gate,
        arguments.training,
        prepared=arguments.prepared,
        parity_asked=config.parity,
    )
    say(f"gate: {found.verdict}")
    for check in found.checks:
        say(f"gate: {check.result:7} {check.reason}")
    if found.speed:
        say(f"gate: {found.speed.text}")
    for part in [*found.shown_worth, *found.regions, *found.slices]:
        say(f"gate: {part.reason}")


if __name__ == "__main__":
    run_stage(
        __doc__,
        ["prepared", "evaluation", "candidate", "incumbent", "parity", "looks", "training", "out"],
        _main,
    )
