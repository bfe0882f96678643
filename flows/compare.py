"""Train each method on the same rows, score it on the same test rows, and time it in the gateway's engine.

This runs in a workspace whose results are not committed. All methods start from the base, because a
champion's adapter fits only its own method. It uses no Prefect: nothing is retried, and nobody schedules it.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import get_args

import msgspec

from flows.training_inputs import PREPARED, Say, make_material, open_bench
from ratchet.config.docs import render_params
from ratchet.config.params import Config
from ratchet.config.training import AdapterConfig
from ratchet.errors import RatchetError, UserError
from ratchet.evaluation.report import Metrics, read_metrics
from ratchet.files import read_json, write_json, write_text
from ratchet.models.loading import weights_file
from ratchet.monitoring.topics import FILE as REGION
from ratchet.pipeline.checkout import locked
from ratchet.promotion.verdict import Speed
from ratchet.reporting.comparison import Comparison, Failed, Measured, markdown
from ratchet.training.launch import (
    CANDIDATE,
    PARAMS,
    Material,
    read_figures,
    refuse_private,
    require_success,
    run_module,
    run_training,
)
from ratchet.training.search_space import Changes, with_changes

OUT = Path("reports/compare")
METHODS = get_args(AdapterConfig.model_fields["method"].annotation)
FROM_BASE = {"train.start_from": "base"}


def compare(home: Path, config: Config, methods: list[str], say: Say) -> Comparison:
    """Return the contents of reports/compare/compare.json. A method that fails is a row with its reason.

    Raises UserError, ConfigError, StageError.
    """
    refuse_private(config, "compare")
    plans = {method: settings_of(config, method) for method in dict.fromkeys(methods)}
    for changes in plans.values():
        with_changes(config, changes)
    with locked(home, "compare", wait=False), open_bench(home, "compare", say) as workspace:
        made = make_material(workspace, FROM_BASE, say)
        nobody = workspace.path / ".ratchet/compare/nobody"
        write_json(nobody / "manifest.json", {"version": None, "batches": []})
        rows = [
            measure(workspace.path, made._replace(incumbent=nobody), config, method, changes, say)
            for method, changes in plans.items()
        ]
        commit = workspace.git("rev-parse", "HEAD").strip()
    scored = next((row.test_rows for row in rows if isinstance(row, Measured)), 0)
    found = Comparison(config.gate.metric, scored, config.train.seed, commit, _machine(), rows)
    write_json(home / OUT / "compare.json", msgspec.to_builtins(found))
    write_text(home / OUT / "compare.md", markdown(found))
    return found


def settings_of(config: Config, method: str) -> Changes:
    if method not in METHODS:
        raise UserError(f"{method!r} is no method", remedy=f"known: {', '.join(METHODS)}")
    return {"adapter.method": method, **FROM_BASE, **config.compare.settings.get(method, {})}


def measure(
    place: Path, material: Material, config: Config, method: str, changes: Changes, say: Say
) -> Measured | Failed:
    folder = place / ".ratchet/compare" / method
    folder.mkdir(parents=True, exist_ok=True)
    try:
        say(f"compare: {method} trains …")
        require_success(run_training(folder, material, with_changes(config, changes)), "training")
        figures = read_figures(folder)
        say(f"compare: {method} trained in {figures['seconds']:.0f} s; it is scored and asked …")
        metrics = _evaluate(folder, place, material, config, changes)
        latency = _latency(folder, place, material)
    except RatchetError as error:
        say(f"compare: {method}: {error}")
        return Failed(method, changes, " ".join(str(error).partition("\n")[0].split()))
    test = metrics.slices["test"]["candidate"]
    return Measured(
        method,
        changes,
        quality=test.scores[config.gate.metric],
        test_rows=test.rows,
        validation_loss=figures["best_validation_loss"],
        seconds=figures["seconds"],
        peak_mib=figures.get("peak_gpu_mib", figures["peak_mib"]),
        saved_mib=weights_file(folder / CANDIDATE).stat().st_size / 2**20,
        latency=latency,
        figures=figures,
    )


def _evaluate(folder: Path, place: Path, material: Material, config: Config, changes: Changes) -> Metrics:
    """Evaluate as the project does, without the parts that are not needed to compare methods."""
    params, out = folder / "evaluate.yaml", folder / "evaluation"
    write_text(
        params,
        render_params(
            with_changes(
                config,
                {
                    **changes,
                    "evaluate.simple_baseline": False,
                    "evaluate.bias_pairs": 0,
                    "evaluate.blind_rows": 0,
                },
            )
        ),
    )
    paths = {
        "params": params,
        "prepared": place / PREPARED,
        "base": material.base,
        "incumbent": material.incumbent,
        "candidate": folder / CANDIDATE,
        "region": place / REGION,
        "own": place / "metrics",
        "out": out,
    }
    require_success(run_module("tasks.evaluate", _words(paths), folder), "evaluation")
    return read_metrics(out)


def _latency(folder: Path, place: Path, material: Material) -> Speed:
    out = folder / "latency.json"
    paths = {
        "params": folder / PARAMS,
        "prepared": place / PREPARED,
        "base": material.base,
        "candidate": folder / CANDIDATE,
        "out": out,
    }
    require_success(run_module("tasks.latency", _words(paths), folder), "asking in the gateway's engine")
    return msgspec.convert(read_json(out), Speed)


def _words(paths: dict[str, Path]) -> list[str]:
    return [word for name, path in paths.items() for word in (f"--{name}", str(path.absolute()))]


def _machine() -> str:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()} cores ({platform.machine()}), {gpu}"
