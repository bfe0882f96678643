"""Copy the results of the stages to the candidate's MLflow run: curve, scores, figures, data, verdict.

This is a task of a flow, not a stage. Recording twice changes nothing. Its functions raise ServiceError when
MLflow does not answer; the local files remain, and the next run records them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ratchet.config.params import Config
from ratchet.evaluation.report import Metrics, read_metrics
from ratchet.files import read_json, sha256_json
from ratchet.models.manifests import TrainedManifest, describe_base, read_trained_manifest
from ratchet.models.processors import kinds_read
from ratchet.promotion.champion import Data, GateLine
from ratchet.promotion.lineage import STARTED_FROM, TAUGHT_BY
from ratchet.promotion.verdict import Verdict, read_verdict
from ratchet.reporting.evaluation_page import Evaluated, write_evaluation_page
from ratchet.reporting.heatmap import draw
from ratchet.reporting.markdown import MODELS, model_card
from ratchet.reporting.model_card import hub_card
from ratchet.reporting.retention import Retention
from ratchet.tracking.curve import Point, log_points, read_history
from ratchet.tracking.mlflow import (
    KEY_TAG,
    STATE_TAG,
    find_or_create_run,
    mlflow_client,
    mlflow_errors,
    parameters,
    running_runs,
)
from ratchet.tracking.registry import ARTIFACT, Version, make_version
from ratchet.training.schedule import Figures

PAGE = Path(".ratchet/evaluation.html")  # in the workspace; no output of a stage
MAX_DESCRIPTION = (
    5000  # characters of a version's description (mlflow/store/model_registry/dbmodels/models.py)
)


class Findings(NamedTuple):
    """The results of all stages in a workspace, after the gate."""

    manifest: TrainedManifest
    figures: Figures
    metrics: Metrics
    decision: Verdict
    profile: Any  # the JSON of data/prepared/profile.json
    folder: Path

    @property
    def data(self) -> Data:
        """Return the data's DVC hash, and its size in batches and rows."""
        raw = (self.folder / "data/raw.dvc").read_text(encoding="utf-8")
        digest = next(line.split("md5:")[1].strip() for line in raw.splitlines() if "md5:" in line)
        total = self.profile["total"]
        sizes = {name: total[name]["rows"] for name in ("accepted", "rejected", "duplicate")}
        batches = len(self.manifest.batches)
        if together := self.manifest.federation:
            share = together.told_share
            return Data(digest, batches, together.rows, **sizes, nodes=together.nodes, share=share)
        return Data(digest, batches, total["rows"], **sizes)


def read_findings(folder: Path) -> Findings:
    return Findings(
        manifest=read_trained_manifest(folder / "models/candidate"),
        figures=read_json(folder / "reports/train/figures.json"),
        metrics=read_metrics(folder / "reports/evaluation"),
        decision=read_verdict(folder / "reports/gate.json"),
        profile=read_json(folder / "data/prepared/profile.json"),
        folder=folder,
    )


def record(found: Findings, config: Config, *, commit: str, reason: str) -> str:
    """Record the findings in the candidate's MLflow run, and return the run's id. Raises ServiceError."""
    key = found.manifest.run_key
    run_id = find_or_create_run(config.project.name, key, {"mlflow.runName": f"train-{key[:8]}"})
    log_points(run_id, read_history(found.folder / "reports/train/history.jsonl"))
    client = mlflow_client()
    with mlflow_errors():
        _log_values(client, run_id, found, config)
        _log_dataset(client, run_id, found, commit)
        tags = {
            "ratchet.git_commit": commit,
            "ratchet.reason": reason,
            "ratchet.verdict": found.decision.verdict,
            "ratchet.adapter_sha256": found.manifest.adapter_sha256,
            STATE_TAG: "gated",
        }
        for name, value in tags.items():
            client.set_tag(run_id, name, value)
        _log_figures(client, run_id, found)
        for folder in ("reports/train", "reports/evaluation"):
            client.log_artifacts(run_id, str(found.folder / folder), folder)
        for name in ("gate", "parity"):
            client.log_artifact(run_id, str(found.folder / f"reports/{name}.json"), "reports")
        client.set_terminated(run_id, "FINISHED")
    return run_id


def record_page(found: Findings, evaluated: Evaluated, retention: Retention, *, run_id: str) -> None:
    """Record the evaluation's page, and the retention table as JSON and heat map. Raises ServiceError."""
    from matplotlib import use

    use("Agg")
    page = write_evaluation_page(found.folder / PAGE, evaluated)
    client = mlflow_client()
    with mlflow_errors():
        client.log_artifact(run_id, str(page), "reports")
        client.log_figure(run_id, draw(retention), "figures/retention.png")
        client.log_dict(run_id, msgspec.to_builtins(retention), "reports/retention.json")


def register(found: Findings, config: Config, *, run_id: str, commit: str) -> Version:
    """Register the candidate as a version of the registered model, with the gate's table as its
    description.
    """
    decision, manifest, data = found.decision, found.manifest, found.data
    facts = {
        "run": f"[{run_id[:8]}](/#/experiments/{_experiment_of(run_id)}/runs/{run_id})",
        "data": data.told,
        "git commit": commit,
        "adapter": f"{config.adapter.method}, sha256 {manifest.adapter_sha256}",
        "base": describe_base(manifest.base),
        "started from": "the champion's adapter" if manifest.inputs.start != "base" else "the base",
    }
    if manifest.federation:
        facts["trained by"] = manifest.federation.told
    if manifest.privacy:
        facts["privacy"] = manifest.privacy.told
    tags = {
        KEY_TAG: manifest.run_key,
        "verdict": decision.verdict,
        "rival": str(decision.rival.version or "base"),
        "git_commit": commit,
        "adapter_sha256": manifest.adapter_sha256,
        STARTED_FROM: manifest.inputs.start,
        "data": json.dumps(msgspec.to_builtins(data), sort_keys=True),
        "batches": json.dumps(manifest.batches),
        "gate": json.dumps(msgspec.to_builtins(gate_line(decision))),
        "generation": json.dumps({"max_new_tokens": config.evaluate.max_new_tokens, "do_sample": False}),
    }
    if manifest.taught_by:
        tags[TAUGHT_BY] = json.dumps(manifest.taught_by)
    version = make_version(
        config.project.name,
        run_id,
        found.folder / "models/candidate",
        tags,
        _fit(model_card(found.metrics, decision, facts)),
    )
    card = hub_card(
        config.project.name,
        f"v{version.number}",
        "adapter",
        manifest,
        found.metrics,
        decision,
        facts,
        reads=kinds_read(found.folder / "models/candidate"),
    )
    with mlflow_errors():
        mlflow_client().log_text(run_id, card, f"{ARTIFACT}/README.md")
    return version


def _fit(card: str) -> str:
    """Keep as many whole lines as the registry's column holds, and say where the rest is.

    PostgreSQL refuses a longer text.
    """
    if len(card) <= MAX_DESCRIPTION:
        return card
    note = "\n… the rest stands in the run's artifacts: reports/gate.json, reports/evaluation/metrics.json\n"
    return card[: MAX_DESCRIPTION - len(note)].rpartition("\n")[0] + note


def gate_line(verdict: Verdict) -> GateLine:
    """Return the ledger's line on the gate: its verdict, and the success metric's gain."""
    success = verdict.success
    mean, low, high = success.gain or (None, None, None)
    return GateLine(verdict.verdict, verdict.rival.version, success.metric, mean, low, high, success.rows)


def close_lost_runs(config: Config, *, but: str) -> int:
    """Close the runs whose process was killed, except the run with the key `but`, and return their number.

    MLflow would show them as RUNNING for ever. Call this under the flow's lock, when no run can be training.
    """
    client = mlflow_client()
    running = running_runs(config.project.name)
    with mlflow_errors():
        lost = [run for run in running if run.data.tags.get(KEY_TAG) not in (None, but)]
        for run in lost:
            client.set_terminated(run.info.run_id, "KILLED")
    return len(lost)


def _experiment_of(run_id: str) -> str:
    with mlflow_errors():
        return str(mlflow_client().get_run(run_id).info.experiment_id)


def _log_values(client: Any, run_id: str, found: Findings, config: Config) -> None:
    from mlflow.entities import Metric, Param

    known = client.get_run(run_id).data.params
    params = [
        Param(key, value[:500])
        for key, value in parameters(config.model_dump(mode="json"))
        if key not in known
    ]
    # The time of the curve's last point, not the present: recording the same scores again adds no point.
    stamp = int(read_history(found.folder / "reports/train/history.jsonl")[-1]["time_ms"])
    values = {f"train/{key}": value for key, value in found.figures.items() if isinstance(value, int | float)}
    for name, models in found.metrics.slices.items():
        for model, summary in models.items():
            part = "/".join(_plain(word) for word in name.split(":", 1))
            figures = {"rows": summary.rows, "perplexity": summary.perplexity}
            figures |= {metric: score.mean for metric, score in summary.scores.items()}
            values |= {f"{part}/{model}/{key}": value for key, value in figures.items() if value is not None}
    values |= zip(("gate/mean", "gate/low", "gate/high"), found.decision.success.gain or (), strict=False)
    client.log_batch(
        run_id, metrics=[Metric(key, float(value), stamp, 0) for key, value in values.items()], params=params
    )


def _plain(word: str) -> str:
    """Make a slice's name, which may be any text of the user's, fit for a metric's name.

    MLflow refuses other characters than these, and `..` as a step of a path.
    """
    return re.sub(r"[^\w .-]+", "_", word).strip(". ")[:100] or "_"


def _log_dataset(client: Any, run_id: str, found: Findings, commit: str) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    digest = found.data.dvc
    source = json.dumps({"path": "data/raw", "dvc": digest, "git_commit": commit})
    dataset = Dataset(
        name="raw",
        digest=digest[:32],
        source_type="dvc",
        source=source,
        profile=json.dumps(found.profile["total"]),
    )
    client.log_inputs(
        run_id,
        [
            DatasetInput(
                dataset,
                [InputTag("mlflow.data.context", "training"), InputTag("sha256", sha256_json(found.profile))],
            )
        ],
    )


def _log_figures(client: Any, run_id: str, found: Findings) -> None:
    from matplotlib import use

    use("Agg")
    figures = {
        "curves": _draw_curves(read_history(found.folder / "reports/train/history.jsonl")),
        "comparison": _draw_comparison(found.metrics),
    }
    for name, figure in figures.items():
        client.log_figure(run_id, figure, f"figures/{name}.png")


def _draw_curves(points: list[Point]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, style in (("train_loss", "-"), ("validation_loss", "o-")):
        drawn = [(point["step"], point[key]) for point in points if key in point]
        axes.plot(*zip(*drawn, strict=True), style, label=key.replace("_", " ")) if drawn else None
    axes.set(xlabel="optimizer step", ylabel="loss (nats a learned token)", title="Training")
    axes.legend()
    return figure


def _draw_comparison(metrics: Metrics) -> Any:
    """Draw exact match by slice and model, with the 95 % intervals."""
    from matplotlib.figure import Figure

    slices = [
        name for name in metrics.slices if name.partition(":")[0] in ("test", "golden", "batch", "region")
    ]
    models = [model for model in MODELS if model in metrics.slices["test"]]
    figure = Figure(figsize=(max(6, 2.2 * len(slices)), 4), layout="constrained")
    axes = figure.subplots()
    for position, model in enumerate(models):
        for place, name in enumerate(slices):
            summary = metrics.slices[name].get(model)
            if summary and (found := summary.scores.get("exact_match")):
                error = [[found.mean - found.low], [found.high - found.mean]]
                axes.bar(
                    place + position * 0.2,
                    found.mean,
                    0.18,
                    yerr=error,
                    color=f"C{position}",
                    label=model if place == 0 else None,
                )
    axes.set_xticks(
        [place + 0.1 * (len(models) - 1) for place in range(len(slices))],
        [name.removeprefix("batch:")[:26] for name in slices],
        rotation=12,
        fontsize=8,
    )
    axes.set(ylabel="exact match", title="Same rows, same run")
    axes.legend()
    return figure
