"""`ratchet base`, `plan`, `changes`, `sweep`, `compare`, `privacy`: what can be trained, what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ratchet.cli.context import Json, find_root, note, read_config, ready_root, say, show

if TYPE_CHECKING:
    from flows.sweep import Summary
    from ratchet.config.params import Config
    from ratchet.training.estimate import Plan


LONG = 600.0  # seconds; compiling takes about one minute, which a shorter training does not regain


def plan(
    prepare: Annotated[
        bool,
        typer.Option(
            "--prepare",
            help="Make base, prepared rows and tokens first, through the DAG; nothing is trained, nothing "
            "lands.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure memory and time of the training in params.yaml over a few steps, and say whether it fits.

    Example: ratchet plan
    """
    root = ready_root() if prepare else find_root()
    config = read_config(root)
    found = _prepared_plan(root, config) if prepare else _plan_here(root, config)
    show({**found._asdict(), "fits": found.fits}, as_json, lambda: say("\n".join(describe(found, config))))


def changes(
    since: Annotated[
        str,
        typer.Option(
            "--since", metavar="COMMIT", help="Compare HEAD with what it has in common with this commit."
        ),
    ] = "origin/main",
    measure: Annotated[
        bool,
        typer.Option("--plan", help="Also measure the training here, as `ratchet plan --prepare` does."),
    ] = False,
    image: Annotated[
        str,
        typer.Option(
            "--image",
            metavar="URL",
            help="Where the forest plot of a new verdict is seen; `{path}` is its place in the repository.",
        ),
    ] = "",
    as_json: Json = False,
) -> None:
    """Print as Markdown what commits do: the data before and after, what would run, the new verdict.

    Example: ratchet changes --since origin/main --plan
    """
    root = find_root()
    from flows.changes import find_changes
    from ratchet.reporting.changes import render_changes
    from ratchet.reporting.forest import FOREST

    def lines(found: Plan, config: Config) -> list[str]:
        return list(describe(found, config))

    found = find_changes(root, since, note, measure=measure, describe=lines)
    here = image.replace("{path}", FOREST) if (root / FOREST).exists() else ""
    show(found, as_json, lambda: say(render_changes(found, here).rstrip("\n")))


def base(as_json: Json = False) -> None:
    """Print the proof of the base: what was checked before anything was trained on it.

    Example: ratchet base
    """
    import msgspec

    from ratchet.errors import UserError
    from ratchet.files import read_json
    from ratchet.models.manifests import PROOF, Proof

    path = find_root() / PROOF
    if not path.exists():
        raise UserError(
            "no proof of the base is here",
            remedy="`dvc repro code base` makes and proves it, as the first retraining does; or dvc pull",
        )
    proof = msgspec.convert(read_json(path), Proof)
    show(msgspec.to_builtins(proof), as_json, lambda: say("\n".join(proof.page())))


def privacy(as_json: Json = False) -> None:
    """Show what trainings have spent of the privacy of each batch's rows, and what is left of the budget.

    Example: ratchet privacy
    """
    from ratchet.federation.records import ledgers
    from ratchet.privacy.ledger import read_spendings, spent_by_batch
    from ratchet.promotion.champion import read_ledger

    root = find_root()
    asked = read_config(root).train.privacy
    spendings = [entry for path in ledgers(root) for entry in read_spendings(path)]
    private = {entry.adapter_sha256 for entry in spendings}
    plain: dict[str, list[int]] = {}  # batch → versions that were in charge and learned it without privacy
    for _, entry in read_ledger(root):
        for batch in entry.batches if entry.adapter_sha256 not in private else ():
            if entry.version not in plain.setdefault(batch, []):
                plain[batch].append(entry.version)
    found = [
        {**line._asdict(), "without_privacy": sorted(plain.get(line.batch, []))}
        for line in spent_by_batch(spendings, asked.delta, plain, unit=asked.unit)
    ]
    budget = asked.most if asked.epsilon else None
    told = {"delta": asked.delta, "budget": budget, "trainings": len(spendings), "batches": found}
    show(told, as_json, lambda: say("\n".join(_privacy_lines(found, asked.delta, budget))))


def _privacy_lines(found: list[dict[str, Any]], delta: float, budget: float | None) -> Iterator[str]:
    if not found:
        yield "nothing was trained with privacy (`train.privacy.epsilon`), and no champion without"
        return
    width = max(len(line["batch"]) for line in found)
    limit = "off" if budget is None else f"{budget:g}"
    yield f"ε spent of each batch's rows in all trainings together, δ = {delta:g}; budget: {limit}"
    for line in found:
        left = "" if budget is None else f", {max(0.0, budget - line['epsilon']):.3g} left"
        versions = ", ".join(f"v{number}" for number in line["without_privacy"])
        yield (
            f"  {line['batch']:{width}}  ε = {line['epsilon']:.3f} in {line['trainings']} trainings{left}"
            + (f"; learned without privacy by {versions}: no ε holds for these" if versions else "")
        )


def sweep(
    trials: Annotated[
        int | None, typer.Option("--trials", min=1, help="Trainings in all; otherwise `sweep.trials`.")
    ] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Write the best settings into params.yaml.")] = False,
    as_json: Json = False,
) -> None:
    """Train with settings from `sweep.space`, and propose the best as a change of params.yaml.

    After an interruption the same command resumes; with `sweep.storage` on PostgreSQL other machines join in.

    Example: ratchet sweep --trials 30
    """
    root = ready_root()
    from flows.outage import run_flow
    from flows.sweep import sweep as flow

    done = run_flow(flow, root=str(root), trials=trials, apply=apply)
    show(done, as_json, lambda: say("\n".join(_proposal(done))))


def _proposal(done: Summary) -> Iterator[str]:
    best, counts = done["best"], done["counts"]
    elsewhere = f", {counts['running']} run elsewhere" if counts["running"] else ""
    yield (
        f"{done['study']}: {counts['complete']} trials completed, {counts['pruned']} ended early, "
        f"{counts['fail']} failed{elsewhere}"
    )
    today = f"; today's settings {done['baseline']:.4f}" if done["baseline"] is not None else ""
    yield f"best: trial {best['number']}, validation loss {best['value']:.4f} {done['unit']}{today}"
    yield (
        "  chosen as the best of many on the same rows, so it flatters; the gate's test rows decide\n  "
        f"again: {best['command']}"
    )
    if not done["diff"]:
        yield "params.yaml says so already: nothing to change"
        return
    yield done["diff"].rstrip("\n")
    yield (
        "written; git commit -a, then ratchet retrain"
        if done["applied"]
        else "ratchet sweep --apply writes this"
    )


def compare(
    methods: Annotated[
        str, typer.Argument(metavar="METHODS", help="Values of `adapter.method`, with commas.")
    ],
    as_json: Json = False,
) -> None:
    """Train each method on the same rows; show quality, time, memory, size and latency side by side.

    The table is written to reports/compare; `compare.settings` gives a method its own learning rate.

    Example: ratchet compare full,lora,qlora
    """
    root = ready_root()
    from flows.compare import OUT
    from flows.compare import compare as run
    from ratchet.evaluation.paired import LOWER_IS_BETTER
    from ratchet.reporting.comparison import text

    found = run(root, read_config(root), [word.strip() for word in methods.split(",") if word.strip()], note)

    def tell() -> None:
        say("\n".join(text(found)))
        less = ", less is better," if found.metric in LOWER_IS_BETTER else ""
        say(
            f"quality: {found.metric}{less} on {found.rows} test rows; one training each; written to "
            f"{OUT / 'compare.md'}"
        )

    show(found, as_json, tell)


def _prepared_plan(root: Path, config: Config) -> Plan:
    from flows.training_inputs import make_material, open_bench
    from ratchet.training.estimate import plan_training

    with open_bench(root, "plan", note) as workspace:
        return plan_training(make_material(workspace, {}, note), config, note)


def _plan_here(root: Path, config: Config) -> Plan:
    from flows.training_inputs import STAGES, material_of
    from ratchet.pipeline.dvc import Workspace, stale_stages
    from ratchet.training.estimate import plan_training, read_profile

    material = material_of(root)
    read_profile(material.tokens)
    stale = stale_stages(Workspace(root, root, "")) if (root / "dvc.lock").exists() else set()
    if old := [stage for stage in STAGES if stage in stale]:
        note(
            f"params.yaml, rows or code changed since these tokens were made ({', '.join(old)}): `ratchet "
            "plan --prepare` makes them anew first"
        )
    return plan_training(material, config, note)


def describe(found: Plan, config: Config) -> Iterator[str]:
    from ratchet.training.estimate import duration

    yield (
        f"{config.adapter.method} of {found.trainable_weights:,} weights, {found.steps:,} steps, "
        f"{found.evaluations} evaluations (measured: {found.probed_steps} steps)"
    )
    if found.reads_media:
        parts = config.adapter
        yield f"  parts   language model; projector: {parts.projector}, tower: {parts.tower}"
    yield (
        f"  time    {duration(found.seconds)}, {duration(found.stage_seconds)} with loading and saving; "
        "train.patience may end it earlier"
    )
    yield f"          {found.step_seconds:.3g} s a step, {found.evaluation_seconds:.3g} s an evaluation"
    yield f"  memory  {found.peak_mib:,.0f} MiB at the peak, {found.free_mib:,.0f} MiB are free"
    if found.peak_gpu_mib is not None:
        yield (
            f"  GPU     {found.peak_gpu_mib:,.0f} MiB at the peak, {found.free_gpu_mib or 0:,.0f} MiB are "
            "free"
        )
    yield (
        "  it fits"
        if found.fits
        else (
            "  it does NOT fit\n  → lower `train.batch_windows` (and raise `train.accumulate`), set "
            "`train.checkpoint_activations: true`, or take `adapter.method: qlora`"
        )
    )
    if found.seconds > LONG and not config.train.compile:
        yield "  `train.compile: true` may make a training as long as this one faster (docs/training.md)"
