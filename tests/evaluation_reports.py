"""Make the reports of one evaluation, with hostile words, and the retention table of three versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd

from ratchet.files import write_json
from ratchet.reporting.retention import Retention

HOSTILE = "<script>document.title = 'taken'</script>\u202e&\"'[bold]<img src=https://example.org/x.png>"
BATCHES = ("20260101T000000Z-first-00000000.jsonl", f"20260201T000000Z-{HOSTILE}.jsonl")
ROWS = 120  # a batch


def make_reports(folder: Path) -> Path:
    """v3 against v1: 30 rows of each batch got better, 25 worse."""
    tables = []
    for model in ("candidate", "champion", "base"):
        for batch in BATCHES:
            right = [_right(model, number) for number in range(ROWS)]
            tables.append(
                pd.DataFrame(
                    {
                        "id": [f"{batch[:9]}{number:03}" for number in range(ROWS)],
                        "batch": batch,
                        "model": model,
                        "question": [f"question {number} {HOSTILE}" for number in range(ROWS)],
                        "reference": "wanted",
                        "answer": ["wanted" if good else f"wrong {HOSTILE}" for good in right],
                        "answer_nll": [
                            1.0 + number / 100 + (model == "champion") * 0.1 for number in range(ROWS)
                        ],
                        "exact_match": [float(good) for good in right],
                    }
                )
            )
    (folder / "reports/evaluation").mkdir(parents=True)
    pd.concat(tables).to_parquet(folder / "reports/evaluation/scores.parquet", index=False)
    models = {
        model: {"rows": 2 * ROWS, "exact_match": interval(0.4 + 0.1 * place), "answer_nll": interval(1.2)}
        for place, model in enumerate(("base", "champion", "candidate"))
    }
    slices = {name: models for name in ("test", "golden", *(f"batch:{batch}" for batch in BATCHES))}
    write_json(
        folder / "reports/evaluation/metrics.json",
        {"rows": 2 * ROWS, "champion": 1, "slices": slices, "pairs": 0},
    )
    checks = [
        check("success", 0.04, "pass"),
        check("golden", -0.02, "unclear"),
        check(f"past:{BATCHES[1]}", -0.2, "fail"),
        {**check("answer_nll", 0.1, "pass"), "metric": "answer_nll"},
    ]
    verdict = {
        "verdict": "reject",
        "reasons": [f"guardrail past: worse {HOSTILE}"],
        "rival": {"model": "champion", "version": 1},
        "candidate": {"run_key": "key1", "adapter_sha256": "a" * 64},
        "checks": checks,
    }
    write_json(
        folder / "reports/gate.json",
        {
            **verdict,
            "regions": [check("region:numpy", 0.1, "pass")],
            "slices": [check("kind:module", -0.03, "unclear")],
        },
    )
    lines = [
        {
            "step": step,
            "time_ms": step,
            "train_loss": 3 / step,
            **({"validation_loss": 3.2 / step} if step % 5 == 0 else {}),
        }
        for step in range(1, 41)
    ]
    (folder / "reports/train").mkdir()
    (folder / "reports/train/history.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
    )
    return folder


def _right(model: str, number: int) -> bool:
    """0 to 29 got better, 30 to 54 worse, the others stayed."""
    return {
        "candidate": number < 30 or number >= 90,
        "champion": 30 <= number < 55 or number >= 90,
        "base": False,
    }[model]


def interval(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.05, "high": mean + 0.05}


def check(name: str, mean: float, result: str) -> dict[str, Any]:
    return {
        "name": name,
        "metric": "exact_match",
        "rows": 2 * ROWS,
        **interval(mean),
        "wanted": -0.05,
        "result": result,
        "reason": f"{name} is as it is {HOSTILE}",
    }


def _cell(mean: float) -> dict[str, Any]:
    return {"rows": ROWS, **interval(mean), "from": "abcdef01"}


TABLE: dict[str, Any] = {
    "metric": "exact_match",
    "slices": [*BATCHES, "golden"],
    "rows": {**dict.fromkeys(BATCHES, ROWS), "golden": 40},
    "versions": [
        {
            "name": name,
            "version": number,
            "adapter": "",
            "commit": "",
            "at": "",
            "cells": dict(zip([*BATCHES, "golden"], cells, strict=True)),
        }
        for name, number, cells in (
            ("base", None, [_cell(0.1), _cell(0.15), _cell(0.2)]),
            ("v1", 1, [_cell(0.6), None, _cell(0.5)]),
            ("v3", 3, [_cell(0.35), _cell(0.7), _cell(0.45)]),
        )
    ],
    "faults": [f"the scores of 01234567 cannot be had {HOSTILE}"],
}
RETENTION = msgspec.convert(TABLE, Retention)
