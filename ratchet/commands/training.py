"""`ratchet plan`, `ratchet sweep` and `ratchet compare`: before a training, and which settings it should have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ratchet.commands.here import Json, find_root, note, read_config, ready_root, say, show

if TYPE_CHECKING:
    from ratchet.config import Config
    from ratchet.plan import Plan


def plan(
    prepare: Annotated[bool, typer.Option("--prepare", help="Make base, prepared rows and tokens first, through the DAG; nothing is trained, nothing lands.")] = False,
    as_json: Json = False,
) -> None:
    """Memory and time of the training that params.yaml asks for, measured over a few steps, and whether it fits.

    Example: ratchet plan
    """
    root = ready_root() if prepare else find_root()
    config = read_config(root)
    found = _prepared_plan(root, config) if prepare else _plan_here(root, config)
    show({**found._asdict(), "fits": found.fits}, as_json, lambda: say("\n".join(_describe(found, config))))


def _prepared_plan(root: Path, config: Config) -> Plan:
    from flows.material import make_material, open_bench
    from ratchet.plan import plan_training

    with open_bench(root, "plan", note) as workspace:
        return plan_training(make_material(workspace, {}, note), config, note)


def _plan_here(root: Path, config: Config) -> Plan:
    from flows.material import STAGES, material_of
    from ratchet.plan import plan_training, read_profile
    from ratchet.workspace import Workspace, stale_stages

    material = material_of(root)
    read_profile(material.tokens)
    stale = stale_stages(Workspace(root, root, "")) if (root / "dvc.lock").exists() else set()
    if old := [stage for stage in STAGES if stage in stale]:
        note(f"params.yaml, rows or code changed since these tokens were made ({', '.join(old)}): `ratchet plan --prepare` makes them anew first")
    return plan_training(material, config, note)


def _describe(found: Plan, config: Config) -> Iterator[str]:
    yield f"{config.adapter.method} of {found.trainable_weights:,} weights, {found.steps:,} steps, {found.evaluations} evaluations (measured: {found.probed_steps} steps)"
    yield f"  time    {_duration(found.seconds)}, {_duration(found.stage_seconds)} with loading and saving; train.patience may end it earlier"
    yield f"          {found.step_seconds:.3g} s a step, {found.evaluation_seconds:.3g} s an evaluation"
    yield f"  memory  {found.peak_mib:,.0f} MiB at the peak, {found.free_mib:,.0f} MiB are free"
    if found.peak_gpu_mib is not None:
        yield f"  GPU     {found.peak_gpu_mib:,.0f} MiB at the peak, {found.free_gpu_mib or 0:,.0f} MiB are free"
    yield (
        "  it fits"
        if found.fits
        else "  it does NOT fit\n  → lower `train.batch_windows` (and raise `train.accumulate`), set `train.checkpoint_activations: true`, or take `adapter.method: qlora`"
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
