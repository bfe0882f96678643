"""The page of one evaluation: one HTML file without scripts or anything from outside, in MLflow beside the run and by `ratchet gate explain`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ratchet.files import write_text
from ratchet.parity_guardrail import speed_line
from ratchet.reporting.charts import Line, Tick, intervals, nice_top
from ratchet.reporting.dashboard_view import environment, word_of
from ratchet.reporting.heatmap import heat
from ratchet.reporting.markdown import LABELS, VERDICTS

LOSSES = ("train_loss", "validation_loss")


def write_evaluation_page(path: Path, found: dict[str, Any]) -> Path:
    write_text(path, render_evaluation(found))
    return path


def render_evaluation(found: dict[str, Any]) -> str:
    """`found` is `ratchet.reporting.evaluation_figures.gather`'s. Texts of people are escaped; halves of surrogate pairs become question marks."""
    return environment().get_template("evaluation.html").render(found, **_views(found)).encode("utf-8", "replace").decode()


def _views(found: dict[str, Any]) -> dict[str, Any]:
    decision = found["decision"]
    checks = [*decision["checks"], *decision.get("regions", [])]
    return {
        "verdict": VERDICTS[decision["verdict"]].partition(" ")[2],
        "labels": LABELS,
        "checks": _with_intervals(checks),
        "slices": _with_intervals(decision.get("slices", [])),
        "batches": {name.partition(":")[2]: part for name, part in found["metrics"]["slices"].items() if name.startswith("batch:")},
        "speed": speed_line(decision["speed"]) if decision.get("speed") else "",
        "curve_view": _curve(found["curve"]),
        "heat": heat(found["ledger"]) if found["ledger"] else None,
    }


def _with_intervals(checks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All gains of one metric on one axis; checks without figures have no interval."""
    whole = [place for place, check in enumerate(checks) if all(isinstance(check.get(key), int | float) for key in ("low", "mean", "high"))]
    drawn: dict[int, Any] = {}
    axis = ["money" if check["name"] == "worth" else check["metric"] for check in checks]
    for metric in {axis[place] for place in whole}:
        places = [place for place in whole if axis[place] == metric]
        drawn |= zip(places, intervals([(checks[place]["low"], checks[place]["mean"], checks[place]["high"], checks[place].get("wanted")) for place in places]), strict=True)
    return [{**check, "drawn": drawn.get(place), **_badge(check)} for place, check in enumerate(checks)]


def _badge(check: dict[str, Any]) -> dict[str, str]:
    """What it says, and its colour: a drifted topic that is not cured failed nobody."""
    if check["name"].startswith("region:"):
        return {"word": word_of(check), "look": "unclear" if check["result"] == "fail" else check["result"]}
    return {"word": {"pass": "passed", "fail": "failed"}.get(check["result"], "unclear"), "look": check["result"]}


def _curve(points: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Losses over optimizer steps, in per cent of the chart."""
    series = {key: [(point["step"], point[key]) for point in points if key in point] for key in LOSSES}
    every = [value for part in series.values() for _, value in part]
    if not every:
        return None
    top, last = nice_top(max(every)), max(point["step"] for point in points) or 1
    lines = [Line([(100 * step / last, 100 - 100 * min(1.0, value / top)) for step, value in part], number) for number, part in enumerate(series.values())]
    return {
        "lines": [line for line in lines if line.points],
        "names": [(number, key.replace("_", " ")) for number, key in enumerate(LOSSES) if series[key]],
        "heights": [Tick(100 - 25 * part, f"{top * part / 4:.3g}") for part in range(5)],
        "ticks": [Tick(100 * part / 4, f"{last * part / 4:.0f}") for part in (1, 2, 3)],
        "last": last,
    }
