"""Measure how long a version's answers to test questions take, for `ratchet compare`; this is no stage.

    python -m tasks.latency --prepared data/prepared --base models/base --candidate models/candidate \\
        --out latency.json
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import islice
from pathlib import Path

import msgspec

from ratchet.config.params import Config
from ratchet.data.examples import read_examples
from ratchet.errors import DataError
from ratchet.files import write_json
from ratchet.media.store import FOLDER as MEDIA
from ratchet.media.store import MediaStore
from ratchet.parity.latency import ASKED, WARM_UP, measure_speed
from ratchet.pipeline.stage import run_stage
from ratchet.promotion.verdict import Speed
from ratchet.serving.bundle import bundle_candidate


def measure(prepared: Path, base: Path, candidate: Path, config: Config) -> Speed:
    """Measure the speed on the first test rows. Raises DataError when there are too few."""
    rows = list(islice(read_examples(prepared / "test.jsonl"), WARM_UP + ASKED))
    if len(rows) <= WARM_UP:
        raise DataError(
            f"there are {len(rows)} test rows; wanted more than {WARM_UP} to measure answers by",
            remedy="raise `prepare.test_share`, or ingest more rows",
        )
    bundle, media = bundle_candidate(candidate, base, config), MediaStore.read(prepared / MEDIA)
    with tempfile.TemporaryDirectory() as scratch:
        return measure_speed(bundle, rows, config, Path(scratch), media)


def _main(config: Config, arguments: argparse.Namespace) -> None:
    speed = measure(arguments.prepared, arguments.base, arguments.candidate, config)
    write_json(arguments.out, msgspec.to_builtins(speed))


if __name__ == "__main__":
    run_stage(__doc__, ["prepared", "base", "candidate", "out"], _main)
