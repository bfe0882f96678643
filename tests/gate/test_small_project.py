"""A hundred rows go from the base to a verdict with the thresholds as they come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from stages import run_stages

from ratchet.config.evaluation import EvaluateConfig, ParityConfig
from ratchet.config.params import Config
from ratchet.config.training import AdapterConfig
from ratchet.data.batches import write_batch
from ratchet.data.examples import read_examples
from tasks.ingest import Pulled, freeze_golden


@pytest.mark.timeout(300)
def test_a_hundred_rows_reach_a_verdict_that_says_how_little_they_can_show(
    tmp_path: Path, tiny_base: Path, nobody: Path, tiny_config: Config, raw_rows: list[dict[str, Any]]
) -> None:
    config = Config(  # thresholds are the defaults
        base=tiny_config.base,
        adapter=AdapterConfig(rank=4, alpha=8.0),
        evaluate=EvaluateConfig(max_new_tokens=8),
        parity=ParityConfig(merged=False),
    )
    lines = [msgspec.json.encode(row) for row in raw_rows[:100]]
    golden, folder = tmp_path / "golden.jsonl", tmp_path / "prepared"
    pulled = Pulled(lines, "jsonl", "rows", "messages")
    assert freeze_golden(golden, pulled, config, rows=10, base=tiny_base) == 10
    batch = {"source": "jsonl", "label": "rows", "time": "2026-01-01T00:00:00Z", "licence": "PSF-2.0"}
    write_batch(tmp_path / "raw", lines, **batch, who="tests", form="messages")

    verdict = run_stages(tmp_path, tiny_base, nobody, config).verdict
    assert all(list(read_examples(folder / f"{split}.jsonl")) for split in ("train", "validation", "test"))
    success = verdict.checks[0]
    assert success.name == "success" and success.rows < 30
    assert "rows show no gain under" in success.reason or "gate.min_rows" in success.reason
