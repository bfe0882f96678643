"""Write the model card in the hub's format: a README.md with a YAML head for hubs and programs, and the
gate's table for people.

https://huggingface.co/docs/hub/model-cards. The card claims no licence for the version, because the licences
of the base and of the rows decide. It repeats the base's licence as it was found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from ratchet.evaluation.report import Metrics
from ratchet.evaluation.statistics import Interval
from ratchet.models.manifests import BaseName, TrainedManifest, describe_base
from ratchet.promotion.verdict import Verdict
from ratchet.reporting.markdown import LABELS, model_card

RELATIONS = {
    "adapter": "adapter",
    "merged": "finetune",
    "gguf": "finetune",
    "int8": "quantized",
    "int4": "quantized",
}
TASKS = {  # what a model reads besides text → the hub's name of its task
    (): "text-generation",
    ("image",): "image-text-to-text",
    ("audio",): "audio-text-to-text",
    ("image", "audio"): "any-to-any",
}
USAGE = {
    "adapter": (
        'A PEFT adapter, to be loaded on its base: `PeftModel.from_pretrained(base, "FOLDER")`. Ratchet\'s'
        " gateway serves it as it is."
    ),
    "full": (
        'A whole model: `AutoModelForCausalLM.from_pretrained("FOLDER")`. Ratchet\'s gateway serves it as'
        " it is."
    ),
    "merged": (
        'A whole model, the adapter merged into its base: `AutoModelForCausalLM.from_pretrained("FOLDER")`.'
    ),
    "gguf": (
        "One file in float16 for llama.cpp and what is built on it: `llama-server -m FOLDER/model.gguf"
        " --jinja`."
    ),
    "int8": (
        "One file with 8 bits a weight (Q8_0) for llama.cpp and what is built on it: `llama-server -m"
        " FOLDER/model.gguf --jinja`."
    ),
    "int4": (
        "One file with 4 bits a weight (Q4_0; the embeddings with 8) for llama.cpp and what is built on it:"
        " `llama-server -m FOLDER/model.gguf --jinja`."
    ),
}


class ExportScores(msgspec.Struct, frozen=True):
    """Score an exported file and the adapter on the same rows, by metric; the difference is paired."""

    rows: int
    adapter: dict[str, Interval]
    export: dict[str, Interval]
    difference: dict[str, Interval]


def hub_card(
    name: str,
    label: str,
    kind: str,
    manifest: TrainedManifest,
    metrics: Metrics,
    decision: Verdict,
    facts: dict[str, str],
    *,
    scores: ExportScores | None = None,
    reads: Sequence[str] = (),
) -> str:
    """Render the model card for the hub.

    `kind` is `adapter`, or the format of the export; `manifest` is the candidate's; `reads`: what the base
    reads besides text, `image` or `audio`.
    """
    method, base = manifest.adapter.method, _hub_id(manifest.base)
    usage = USAGE["full" if kind in ("adapter", "merged") and method == "full" else kind]
    if reads:
        loads = "AutoModelForMultimodalLM" if "audio" in reads else "AutoModelForImageTextToText"
        usage = usage.replace("AutoModelForCausalLM", loads)
        what = " and ".join({"image": "pictures", "audio": "recordings"}[one] for one in reads)
        usage += f' Its processor of {what} is `AutoProcessor.from_pretrained("FOLDER")`.'
    lines = [
        f"# {name} {label}",
        "",
        usage,
        "",
        f"Trained by `{method}` on {_told(manifest.base)}.",
    ]
    if scores:
        lines += ["", *score_table(kind, scores)]
    if scores:
        rows, values = scores.rows, scores.export
    else:
        candidate = metrics.slices["test"]["candidate"]
        rows, values = candidate.rows, candidate.scores
    return (
        f"---\n{_head(name, label, kind, method, base, rows, values, reads=reads)}\n---\n\n"
        + "\n".join(lines)
        + "\n\n"
        + model_card(metrics, decision, facts)
    )


def score_table(kind: str, scores: ExportScores) -> list[str]:
    """Return a table of an export's scores beside those of its adapter, on the same rows."""
    lines = [
        f"On {scores.rows} test rows, 95 % intervals:",
        "",
        f"| | adapter | {kind} | difference |",
        "|---|---|---|---|",
    ]
    for metric in scores.adapter:
        parts = (scores.adapter, scores.export, scores.difference)
        cells = [part[metric].text(".4f") for part in parts]
        lines.append(f"| {LABELS.get(metric, metric)} | {' | '.join(cells)} |")
    return lines


def _hub_id(base: BaseName) -> str:
    """Return the base's id on the hub; empty for a base that did not come from a hub."""
    return str(base.model) if base.revision else ""


def _told(base: BaseName) -> str:
    return "a small base that was made for it" if base.model in (None, "demo") else describe_base(base)


def _head(
    name: str,
    label: str,
    kind: str,
    method: str,
    base: str,
    rows: int,
    scores: Mapping[str, Interval],
    *,
    reads: Sequence[str],
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    task = TASKS[tuple(reads)]
    results = [
        EvalResult(
            task_type=task,
            task_name=task.capitalize().replace("-", " "),
            dataset_type=name,
            dataset_name=f"held-out rows of {name}",
            dataset_split="test",
            dataset_args={"rows": rows},
            metric_type=metric,
            metric_name=LABELS.get(metric, metric),
            metric_value=round(value.mean, 6),
            metric_args={"low": round(value.low, 6), "high": round(value.high, 6), "confidence": 0.95},
        )
        for metric, value in scores.items()
    ]
    whole = kind != "adapter" or method == "full"
    relation: Any = (
        {"base_model_relation": RELATIONS["merged" if kind == "adapter" and whole else kind]} if base else {}
    )
    head = ModelCardData(
        base_model=base or None,
        library_name=(
            "transformers" if whole and kind in ("adapter", "merged") else "gguf" if whole else "peft"
        ),
        pipeline_tag=task,
        tags=["ratchet", method, *(["gguf", "llama.cpp"] if kind in ("gguf", "int8", "int4") else [])],
        model_name=f"{name} {label}",
        eval_results=results,
        **relation,
    )
    return head.to_yaml()
