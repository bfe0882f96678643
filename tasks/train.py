"""Train an adapter on the packed windows: LoRA or QLoRA, from the base or from the champion's adapter.

    python -m tasks.train --tokens data/tokenized --base models/base --incumbent models/incumbent --out models/candidate --reports reports/train

Writes the adapter (safetensors), tokenizer, chat template and manifest.json; the curve and the figures under --reports.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import resource
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ratchet.config import Config
from ratchet.errors import BaseModelError
from ratchet.files import read_json, require_space, sha256_file, sha256_json, whole_folder, write_json
from ratchet.models import MANIFEST, adapter_sha256, add_adapter, load_adapter, load_base, load_tokenizer, precision, prepare_quantised, quiet
from ratchet.packing import IGNORED, read_windows
from ratchet.stage import run_stage, say
from ratchet.tracking import History, LiveCopy, code_sha256

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


def train(tokens: Path, base: Path, incumbent: Path, out: Path, reports: Path, config: Config) -> dict[str, Any]:
    """Returns the figures of the run. Raises DivergenceError, DiskSpaceError, BaseModelError; nothing is left half-written."""
    require_space(out.parent, 200 * 2**20, "the candidate")
    start = _start_from(incumbent, config)
    inputs = _inputs(tokens, base, incumbent, start, config)
    run_key = sha256_json(inputs)[:32]
    profile = read_json(tokens / "profile.json")
    with whole_folder(reports) as report_folder, closing(History(report_folder / "history.jsonl")) as history:
        # A run of another training with the same key would be the same training: its copy is the same.
        copy = LiveCopy(history.path, config.project.name, run_key, {"mlflow.runName": f"train-{run_key[:8]}", "ratchet.state": "training"})
        if "MLFLOW_TRACKING_URI" in os.environ:
            copy.start()
        figures = _optimise(tokens, base, incumbent if start else None, out, config, history, {"run_key": run_key, "inputs": inputs, "batches": _batches(tokens, incumbent)})
        figures["run_key"], figures["rows"] = run_key, profile["train"]
        write_json(report_folder / "figures.json", figures)
        delivered = "MLFLOW_TRACKING_URI" in os.environ and copy.finish()
    say(f"train: curve {'delivered to MLflow' if delivered else 'kept locally; the flow delivers it'}")
    return figures


def _optimise(tokens: Path, base: Path, start: Path | None, out: Path, config: Config, history: History, facts: dict[str, Any]) -> dict[str, Any]:
    from ratchet.training import fit

    windows, validation = read_windows(tokens / "train.arrow"), read_windows(tokens / "validation.arrow")
    schedule = _schedule(len(windows), config)
    tokenizer = load_tokenizer(base)
    model = load_base(base, method=config.adapter.method)
    if config.adapter.method == "qlora":
        model = prepare_quantised(model)
    model = load_adapter(model, start, trainable=True) if start else add_adapter(model, config.adapter, seed=config.train.seed)
    trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    say(
        f"train: {config.adapter.method} of {trainable:,} weights from {'the champion' if start else 'the base'}, {schedule.steps} steps, {precision(config.adapter.method)[0]} ({precision(config.adapter.method)[1]})"
    )
    with quiet():
        outcome = fit(model, windows, validation, schedule, pad_id=_pad_id(tokenizer), report=_reporter(history, schedule.steps))
    learned = sum(label != IGNORED for window in windows for label in window.labels)
    figures = {
        **outcome._asdict(),
        "trainable_weights": trainable,
        "epochs": outcome.steps * config.train.batch_windows * config.train.accumulate / len(windows),
        "learned_tokens_per_second": learned / len(windows) * outcome.steps * config.train.batch_windows * config.train.accumulate / outcome.seconds,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    _save(model, tokenizer, base, out, config, facts)
    say(f"train: {outcome.steps} steps in {outcome.seconds:.0f} s, best validation loss {outcome.best_validation_loss or math.nan:.4f} at step {outcome.best_step}")
    return figures


def _save(model: Any, tokenizer: Any, base: Path, out: Path, config: Config, facts: dict[str, Any]) -> None:
    """Manifest last: its existence says that the folder is whole. It holds no time and no path, so equal trainings are equal bytes."""
    with whole_folder(out) as folder:
        # A path of this machine in the adapter's config would be useless elsewhere, and would differ between equal runs.
        adapter = model.peft_config["default"]
        adapter.base_model_name_or_path = read_json(base / MANIFEST)["model"]
        adapter.target_modules = sorted(adapter.target_modules)  # PEFT would write a set, in an order of its own in every process
        model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)  # "auto" would ask the hub
        tokenizer.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card; ours is written with the gate's table
        write_json(
            folder / MANIFEST,
            {
                **facts,
                "adapter_sha256": adapter_sha256(folder),
                "adapter": config.adapter.model_dump(mode="json"),
                "base": {key: value for key, value in read_json(base / MANIFEST).items() if key in ("model", "revision", "context")},
                "precision": precision(config.adapter.method)[0],
                "environment": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
                "files": {path.name: sha256_file(path) for path in sorted(folder.iterdir())},
            },
        )


def _start_from(incumbent: Path, config: Config) -> bool:
    """Whether to go on from the champion's adapter. Raises BaseModelError when its base or its shape is another than the one asked for."""
    if config.train.start_from == "base" or read_json(incumbent / MANIFEST)["version"] is None:
        return False
    if (incumbent / "base").exists():
        raise BaseModelError("the champion's adapter was trained on another base", remedy="set `train.start_from: base`")
    theirs, wanted = read_json(incumbent / MANIFEST).get("adapter", {}), config.adapter.model_dump(mode="json", exclude={"method"})
    differing = [f"`{key}` {theirs.get(key)}, wanted {value}" for key, value in wanted.items() if theirs.get(key) != value]
    if differing:
        raise BaseModelError(f"the champion's adapter has another shape: {', '.join(differing)}", remedy="set `adapter` as the champion has it, or `train.start_from: base`")
    return True


def _inputs(tokens: Path, base: Path, incumbent: Path, start: bool, config: Config) -> dict[str, str]:
    """What the weights depend on."""
    manifest = read_json(base / MANIFEST)
    parts = {
        "tokens": read_json(tokens / "profile.json")["sha256"],
        "base": {key: manifest.get(key) for key in ("model", "revision", "files", "weights")},
        "params": {"train": config.train.model_dump(mode="json"), "adapter": config.adapter.model_dump(mode="json")},
        "code": code_sha256(),
    }
    hashes = {name: sha256_json(part) for name, part in parts.items()}
    return {**hashes, "start": adapter_sha256(incumbent) if start else "base"}


def _batches(tokens: Path, incumbent: Path) -> list[str]:
    """Every batch that the weights have seen, the champion's included."""
    return sorted({*read_json(tokens / "profile.json")["batches"], *read_json(incumbent / MANIFEST)["batches"]})


def _schedule(num_windows: int, config: Config) -> Any:
    from ratchet.training import Schedule

    train = config.train
    steps = max(1, math.ceil(train.epochs * num_windows / (train.batch_windows * train.accumulate)))
    return Schedule(
        steps=steps,
        batch_windows=train.batch_windows,
        accumulate=train.accumulate,
        learning_rate=train.learning_rate,
        kind=train.schedule,
        warmup_share=train.warmup_share,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        evaluations=min(train.evaluations, steps),
        patience=train.patience,
        seed=train.seed,
    )


def _pad_id(tokenizer: Any) -> int:
    from ratchet.chat import ChatFormat

    return ChatFormat(tokenizer).pad_id


def _reporter(history: History, steps: int) -> Any:
    def report(step: int, values: dict[str, float]) -> None:
        history.add(step, values)
        if "validation_loss" in values:
            say(f"train: step {step}/{steps}, validation loss {values['validation_loss']:.4f}")

    return report


def _main(config: Config, arguments: argparse.Namespace) -> None:
    train(arguments.tokens, arguments.base, arguments.incumbent, arguments.out, arguments.reports, config)


if __name__ == "__main__":
    run_stage(__doc__, ["tokens", "base", "incumbent", "out", "reports"], _main)
