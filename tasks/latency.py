"""How long an answer takes: a version in the gateway's engine, asked one test question after the other.

    python -m tasks.latency --prepared data/prepared --base models/base --candidate models/candidate --out latency.json

No stage: for `ratchet compare`.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path
from typing import Any

from ratchet.config.params import Config
from ratchet.data.examples import read_examples
from ratchet.errors import DataError
from ratchet.files import read_json, write_json
from ratchet.models.loading import MANIFEST
from ratchet.parity.latency import ASKED, WARM_UP, measure_speed
from ratchet.pipeline.stage import run_stage
from ratchet.serving.bundle import Bundle, Generation


def measure(prepared: Path, base: Path, candidate: Path, config: Config) -> dict[str, Any]:
    """What `measure_speed` gives. Raises DataError."""
    rows = list(islice(read_examples(prepared / "test.jsonl"), WARM_UP + ASKED))
    if len(rows) <= WARM_UP:
        raise DataError(
            f"there are {len(rows)} test rows; wanted more than {WARM_UP} to measure answers by",
            remedy="raise `prepare.test_share`, or ingest more rows",
        )
    context = int(read_json(base / MANIFEST)["context"])
    return measure_speed(
        Bundle("compared", 1, candidate, base, context, Generation(config.evaluate.max_new_tokens)),
        rows,
        config,
    )


def _main(config: Config, arguments: argparse.Namespace) -> None:
    write_json(arguments.out, measure(arguments.prepared, arguments.base, arguments.candidate, config))


if __name__ == "__main__":
    run_stage(__doc__, ["prepared", "base", "candidate", "out"], _main)
