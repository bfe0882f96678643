"""Run the stages from raw rows to the gate's verdict in this process, each on the files of the one before."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ratchet.config.params import Config
from ratchet.evaluation.report import read_metrics
from ratchet.evaluation.statistics import Interval
from ratchet.files import write_json
from ratchet.parity.report import Report
from ratchet.promotion.verdict import Verdict
from tasks.evaluate import evaluate
from tasks.gate import judge
from tasks.parity import parity
from tasks.prepare import prepare
from tasks.tokenize import tokenize
from tasks.train import train


class Ran(NamedTuple):
    candidate: Path
    scores: dict[str, dict[str, Interval]]  # by model and metric, on the test rows
    compared: Report
    verdict: Verdict


def run_stages(root: Path, base: Path, incumbent: Path, config: Config, *, out: Path | None = None) -> Ran:
    """Read `raw/` and `golden.jsonl` of `root`, write the splits to `prepared/` and the rest to `out`."""
    prepared, out = root / "prepared", out or root
    tokens, candidate, evaluation = out / "tokens", out / "candidate", out / "evaluation"
    prepare(root / "raw", root / "golden.jsonl", prepared, config.prepare)
    tokenize(prepared, base, incumbent, tokens, config)
    train(tokens, base, incumbent, candidate, out / "reports", config)
    evaluate(prepared, base, incumbent, candidate, evaluation, config)
    compared = parity(prepared, tokens, base, candidate, out / "parity.json", config)
    write_json(out / "looks.json", {"judged": {}})
    verdict = judge(
        evaluation,
        candidate,
        incumbent,
        out / "parity.json",
        out / "looks.json",
        out / "gate.json",
        config.gate,
        prepared=prepared,
        parity_asked=config.parity,
    )
    test = read_metrics(evaluation).slices["test"]
    return Ran(candidate, {name: part.scores for name, part in test.items()}, compared, verdict)
