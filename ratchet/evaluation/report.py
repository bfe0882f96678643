"""Type reports/evaluation/metrics.json: what an evaluation found, by slice and by audit.

The gate reads it to tell whether a table is whole; pages, cards and MLflow show it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from ratchet.errors import RatchetError
from ratchet.evaluation.paired import AGAIN
from ratchet.evaluation.statistics import Estimate, Interval
from ratchet.files import read_json

Models = dict[str, Estimate]  # by model: candidate, champion, base, simple


class Summary(msgspec.Struct, frozen=True, omit_defaults=True):
    """Describe a model's answers to the rows of a slice; in the file the scores stand beside `rows`."""

    rows: int
    scores: dict[str, Interval]  # by metric
    perplexity: float | None = None


class Change(msgspec.Struct, frozen=True):
    """Describe how a swapped term changes the score: swapped minus original, and the change's size."""

    rows: int
    difference: Interval
    change: Interval


class Groups(msgspec.Struct, frozen=True):
    """Score each group, and the gap between the best and the worst; None where a mean of 0 has no ratio."""

    by_group: dict[str, Estimate]
    difference: Interval | None
    ratio: Interval | None


class Exposure(msgspec.Struct, frozen=True):
    """Measure the exposure, in bits, of planted canaries and of others that the model cannot know."""

    planted: Estimate
    reference: Estimate


class Suite(msgspec.Struct, frozen=True):
    """Score a public suite; `rows` counts its documents."""

    metric: str
    rows: int
    models: Models = {}


class Agreement(msgspec.Struct, frozen=True, omit_defaults=True):
    """Tell how far a judge agrees with people; `why` says why this is not known.

    `low` is the lower bound of kappa, one-sided at 5 %.
    """

    labels: int | None = None  # decisions of people
    agree: float | None = None
    kappa: float | None = None
    low: float | None = None
    why: str = ""

    @property
    def kappa_text(self) -> str:
        return f"{self.kappa:.2f}, at least {self.low:.2f}"


class Judged(msgspec.Struct, frozen=True):
    """Hold what a judge said of both models; `asked` counts the rows by metric."""

    model: str = ""
    protocol: str = ""
    rows: int = 0
    scores: dict[str, Models] = {}
    asked: dict[str, int] = {}
    failures: dict[str, int] = {}
    agreement: dict[str, Agreement] = {}
    consistent: float | UnsetType = UNSET  # share of pairs in which it preferred one answer from either place


class Metrics(msgspec.Struct, frozen=True, omit_defaults=True):
    """Hold the whole file. A part that was not asked for has its default and is not written."""

    champion: int | None
    candidate: str | None = None  # sha256 of its weights
    rows: int | None = None
    too_long: int | None = None
    pairs: int | None = None  # rows with swapped terms
    attacked: int | None = None
    blind: int | None = None  # rows asked again without their media, or with another row's
    slices: dict[str, dict[str, Summary]] = {}  # by slice and model
    bias: dict[str, dict[str, dict[str, Change]]] = {}  # by metric, list and model
    attacks: dict[str, dict[str, Models]] = {}  # by metric and kind: share withstood
    grouped: list[str] = []  # fields of `meta`
    groups: dict[str, dict[str, dict[str, Groups]]] = {}  # by field, metric and model
    canaries: int | None = None
    audit_canaries: int | None = None
    leaks: dict[str, Exposure] = {}  # by model
    suites: dict[str, Suite] = {}
    judge: Judged | None = None

    @property
    def batches(self) -> dict[str, dict[str, Summary]]:
        """Return the slices that are batches, by their names."""
        return {
            name.removeprefix("batch:"): part
            for name, part in self.slices.items()
            if name.startswith("batch:")
        }

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = msgspec.to_builtins(self)
        for models in found.get("slices", {}).values():
            for summary in models.values():
                summary |= summary.pop("scores")
        return found


def read_metrics(evaluation: Path) -> Metrics:
    """Return what the evaluation in that folder found. Raises RatchetError."""
    return decode_metrics(read_json(evaluation / "metrics.json"), str(evaluation / "metrics.json"))


def decode_metrics(raw: Any, path: str = "metrics.json") -> Metrics:
    try:
        slices = {
            name: {model: _nest(summary) for model, summary in models.items()}
            for name, models in raw.get("slices", {}).items()
        }
        return msgspec.convert({**raw, "slices": slices}, Metrics)
    except (msgspec.ValidationError, AttributeError, TypeError) as error:
        raise RatchetError(f"{path} tells of no evaluation: {error}", remedy=AGAIN) from None


def _nest(summary: dict[str, Any]) -> dict[str, Any]:
    scores = {name: value for name, value in summary.items() if isinstance(value, dict)}
    return {"rows": summary["rows"], "perplexity": summary.get("perplexity"), "scores": scores}
