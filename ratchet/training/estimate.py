"""Estimate a training's memory and time from its shapes and from a probe of a few real optimizer steps.

The probe is the stage itself (`python -m tasks.train`) on real windows, so its peak includes what is loaded,
kept and saved. It takes as many windows as a few steps need: the one with the longest rows, whose batch takes
most memory, and others evenly through all. It makes two passes over them, and measures the whole validation
set twice. The first pass shows the one-time cost of a batch of a new shape, for which libraries prepare
kernels (on a CPU, steps took 1.7 times as long until all shapes had been seen); the second shows the cost of
a later step. If steps are so short that noise would dominate, the probe runs again with more of them. Not
covered: patience may end the training earlier.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import psutil

from ratchet.config.params import Config
from ratchet.errors import UserError
from ratchet.files import read_json, sha256_file, write_json
from ratchet.models.adapters import PREFIXED
from ratchet.models.manifests import read_base_manifest
from ratchet.models.processors import reads_media
from ratchet.training.launch import (
    Material,
    read_figures,
    read_points,
    refuse_private,
    require_success,
    run_training,
)
from ratchet.training.packing import Window, group_rows, read_windows, write_windows
from ratchet.training.schedule import Figures, Points

STEPS, PASSES = 4, 2.0  # steps of one pass, and passes
SHORT_STEP = 0.2  # seconds; shorter steps are probed again, for ENOUGH_SECONDS or MOST_STEPS a pass
ENOUGH_SECONDS, MOST_STEPS = 4.0, 64
MIB = 2**20
BYTES_A_TOKEN = 130  # of a loaded window in Python: three lists and their integers
CGROUP = Path("/sys/fs/cgroup")


class Plan(NamedTuple):
    """The estimated time and memory of a training.

    `seconds` are those of the optimisation, as in reports/train/figures.json; `stage_seconds` include loading
    and saving.
    """

    steps: int
    evaluations: int
    step_seconds: float
    evaluation_seconds: float
    seconds: float
    stage_seconds: float
    trainable_weights: int
    peak_mib: float
    free_mib: float
    peak_gpu_mib: float | None
    free_gpu_mib: float | None
    probed_steps: int
    reads_media: bool = False

    @property
    def fits(self) -> bool:
        return self.peak_mib <= self.free_mib and (
            self.peak_gpu_mib is None or self.free_gpu_mib is None or self.peak_gpu_mib <= self.free_gpu_mib
        )


def plan_training(material: Material, config: Config, say: Callable[[str], None]) -> Plan:
    """Run the probe and extrapolate from it.

    Raises UserError: nothing is tokenized yet, or the training is private; StageError: the probe failed, out
    of memory or otherwise.
    """
    refuse_private(config, "plan")
    read_profile(material.tokens)
    windows, free = read_windows(material.tokens / "train.arrow"), free_mib()
    with tempfile.TemporaryDirectory(prefix="ratchet-plan-") as scratch:
        found = _probe(Path(scratch) / "first", material, config, windows, STEPS, say)
        if found.step_seconds < SHORT_STEP and found.probed_steps < found.steps:
            more = min(MOST_STEPS, math.ceil(ENOUGH_SECONDS / max(found.step_seconds, 1e-3)))
            found = _probe(Path(scratch) / "again", material, config, windows, more, say)
    return found._replace(
        free_mib=free,
        free_gpu_mib=_free_gpu_mib() if found.peak_gpu_mib is not None else None,
        reads_media=reads_media(material.base),
    )


def read_profile(tokens: Path) -> dict[str, Any]:
    path = tokens / "profile.json"
    if not path.exists():
        raise UserError(
            "there are no tokenized rows yet to plan with",
            remedy="ratchet plan --prepare makes them (base, prepare, tokenize) and trains nothing",
        )
    found: dict[str, Any] = read_json(path)
    return found


def _probe(
    folder: Path,
    material: Material,
    config: Config,
    windows: list[Window],
    steps: int,
    say: Callable[[str], None],
) -> Plan:
    chosen = choose_windows(windows, steps * config.train.batch_windows * config.train.accumulate)
    shutil.copytree(material.tokens, folder / "tokens", ignore=shutil.ignore_patterns("train.arrow"))
    write_windows(folder / "tokens/train.arrow", chosen)
    profile = read_json(material.tokens / "profile.json")
    hashes = {**profile["sha256"], "train": sha256_file(folder / "tokens/train.arrow")}
    write_json(folder / "tokens/profile.json", {**profile, "sha256": hashes})
    passes = PASSES if len(chosen) < len(windows) else min(config.train.epochs, PASSES)
    say(f"plan: a training of about {steps} steps, on {len(chosen)} of {len(windows)} windows …")
    ended = run_training(folder, material._replace(tokens=folder / "tokens"), shortened(config, passes))
    require_success(ended, "a training of a few steps")
    packs = read_base_manifest(material.base).packs
    points, figures = read_points(folder), read_figures(folder)
    return extrapolate(points, figures, ended.seconds, config, windows, chosen, packs=packs)


def choose_windows(windows: list[Window], count: int) -> list[Window]:
    """Choose windows at even distances, from the first on.

    `ratchet.training.packing.pack` opens windows for the longest rows first, so all lengths are included.
    """
    if count >= len(windows):
        return windows
    return [windows[place * len(windows) // count] for place in range(count)]


def shortened(config: Config, epochs: float) -> Config:
    """Return the same training with `epochs` passes and two evaluations.

    The first evaluation leaves the best weights in memory, as in the real training.
    """
    return config.model_copy(
        update={
            "train": config.train.model_copy(
                update={"epochs": epochs, "evaluations": 2, "patience": 1000, "checkpoint_minutes": 1e6}
            )
        }
    )


def extrapolate(
    points: Points,
    figures: Figures,
    process_seconds: float,
    config: Config,
    windows: list[Window],
    chosen: list[Window],
    *,
    packs: bool = True,
) -> Plan:
    train = config.train
    apart = config.adapter.method in PREFIXED or not packs or "peak_gpu_mib" not in figures
    whole, part = (
        shapes(windows, train.batch_windows, apart=apart),
        shapes(chosen, train.batch_windows, apart=apart),
    )
    steps, probed = train.steps(len(whole)), figures["steps"]
    evaluations = _evaluations(steps, train.evaluations)
    first_pass = min(probed, math.ceil(len(part) / train.accumulate))
    first, later, evaluation = _paces(points, figures, first_pass)
    step = later * _positions_a_step(whole, train.accumulate) / _positions_a_step(part, train.accumulate)
    new_shape = max(0.0, first - later) * first_pass / len(set(part))
    # The first step's extra time, and the time around the steps, are spent once.
    around = max(
        0.0,
        figures["seconds"]
        - first_pass * first
        - (probed - first_pass) * later
        - _evaluations(probed, 2) * evaluation,
    )
    seconds = (
        around
        + steps * step
        + min(len(set(whole)), steps * train.accumulate) * new_shape
        + evaluations * evaluation
    )
    # A checkpoint holds the weights, the best ones and AdamW's two moments: 4 tensors in float32 (4 bytes).
    writes = seconds > 60 * train.checkpoint_minutes
    checkpoint = 4 * figures["trainable_weights"] * 4 / MIB if writes else 0.0
    rest = (
        BYTES_A_TOKEN
        * (sum(len(window.input_ids) for window in windows) - sum(len(window.input_ids) for window in chosen))
        / MIB
    )
    return Plan(
        steps=steps,
        evaluations=evaluations,
        step_seconds=step,
        evaluation_seconds=evaluation,
        seconds=seconds,
        stage_seconds=seconds + max(0.0, process_seconds - figures["seconds"]),
        trainable_weights=figures["trainable_weights"],
        peak_mib=(figures["peak_mib"] + checkpoint + rest) * train.processes,
        free_mib=math.inf,
        peak_gpu_mib=figures.get("peak_gpu_mib"),
        free_gpu_mib=None,
        probed_steps=probed,
    )


def shapes(windows: list[Window], batch_windows: int, *, apart: bool) -> list[tuple[int, int]]:
    """Return (rows, padded length) of each forward pass of an epoch, batched as `ratchet.training.collation`
    does."""
    if apart or any(window.roles for window in windows):
        return [
            (len(rows), max(len(row.input_ids) for row in rows))
            for rows in group_rows(windows, batch_windows)
        ]
    longest = max(len(window.input_ids) for window in windows)
    return [
        (len(windows[start : start + batch_windows]), longest)
        for start in range(0, len(windows), batch_windows)
    ]


def _positions_a_step(passes: list[tuple[int, int]], accumulate: int) -> float:
    return sum(rows * length for rows, length in passes) / math.ceil(len(passes) / accumulate)


def _evaluations(steps: int, wanted: int) -> int:
    """Return how often a training of `steps` measures the validation loss, with the Trainer's spacing."""
    return math.ceil(steps / max(1, steps // min(wanted, steps)))  # the Trainer measures at the end as well


def _paces(points: Points, figures: Figures, first_pass: int) -> tuple[float, float, float]:
    """Return seconds a step of the first pass, a step of later passes, and an evaluation.

    They come from the times between the points of the curve, so the time before the first point is left out.
    """
    first: list[float] = []
    later: list[float] = []
    evaluations: list[float] = []
    for before, after in pairwise(points):
        seconds = (after["time_ms"] - before["time_ms"]) / 1000
        if "validation_loss" in after:
            evaluations.append(seconds)
        else:
            (first if after["step"] <= first_pass else later).append(
                seconds / (after["step"] - before["step"])
            )
    early = fmean(first) if first else fmean(later) if later else figures["seconds"]
    return early, fmean(later) if later else early, fmean(evaluations) if evaluations else 0.0


def free_mib() -> float:
    """Return the MiB that a new process can have: the machine's, or what the container's limit leaves."""
    free = float(psutil.virtual_memory().available / MIB)
    try:
        limit, used = int((CGROUP / "memory.max").read_text()), int((CGROUP / "memory.current").read_text())
        cached = next(
            int(line.split()[1])
            for line in (CGROUP / "memory.stat").read_text().splitlines()
            if line.startswith("inactive_file ")
        )
    except (OSError, ValueError, StopIteration):  # no container, or one without a limit (`max`)
        return free
    return min(free, (limit - used + cached) / MIB)


def _free_gpu_mib() -> float:
    import torch

    return float(torch.cuda.mem_get_info()[0]) / MIB


def duration(seconds: float) -> str:
    """Format a time for people: in seconds, minutes or hours, by its size."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
