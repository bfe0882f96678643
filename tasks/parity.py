"""Check that the gateway answers as the trainer does: same token ids, same greedy answers, same ends.

    python -m tasks.parity --prepared data/prepared --tokens data/tokenized --base models/base \\
        --candidate models/candidate --out reports/parity.json

A mismatch does not fail the stage: the gate reads the report and rejects. Equal candidates have equal
reports, except for the measured speed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from ratchet.config.params import Config
from ratchet.data.examples import Example, read_examples
from ratchet.errors import DataError
from ratchet.files import write_json
from ratchet.media.store import FOLDER as MEDIA
from ratchet.media.store import MediaStore
from ratchet.models.chat_template import ChatFormat
from ratchet.models.lengths import trained_length
from ratchet.models.loading import load_chat
from ratchet.parity.check import Trained, check_parity, find_trained
from ratchet.parity.latency import WARM_UP, measure_speed
from ratchet.parity.report import Report
from ratchet.pipeline.stage import run_stage, say
from ratchet.serving.bundle import bundle_candidate
from ratchet.training.packing import read_windows, rows_of


def parity(prepared: Path, tokens: Path, base: Path, candidate: Path, out: Path, config: Config) -> Report:
    """Compare, write the report to `out` and return it. Raises DataError without test or training rows."""
    media = MediaStore.read(prepared / MEDIA)
    chat = load_chat(base, media)
    longest = trained_length(candidate, base)
    rows = [row for row in read_examples(prepared / "test.jsonl") if chat.fits(row, longest)]
    fitting = len(rows)
    rows = sorted(rows, key=lambda row: row.id)[: config.parity.rows]
    trained = _trained(prepared, tokens, chat, config.parity.rows)
    if not rows or not trained:
        raise DataError(
            f"{len(rows)} test rows and {len(trained)} training rows to compare on",
            remedy="raise `prepare.test_share` or `tokenize.max_length`, or ingest more rows",
        )
    bundle = bundle_candidate(candidate, base, config)
    with tempfile.TemporaryDirectory() as folder:
        report = check_parity(rows, trained, base, candidate, bundle, config, Path(folder), media)
        report = msgspec.structs.replace(report, fitting=fitting)
        if report.passed and len(rows) > WARM_UP:
            report = msgspec.structs.replace(
                report, speed=measure_speed(bundle, rows, config, Path(folder), media)
            )
    write_json(out, msgspec.to_builtins(report))
    return report


def _trained(prepared: Path, tokens: Path, chat: ChatFormat, most: int) -> list[Trained]:
    """Return the `most` training rows with the smallest ids; ids are hashes, so this is a random sample."""
    rejected = {row["id"] for row in map(_read_line, (tokens / "rejected.jsonl").read_bytes().splitlines())}
    chosen = set((tokens / "rows.txt").read_text(encoding="utf-8").split()) - rejected
    rows: list[Example] = sorted(
        (row for row in read_examples(prepared / "train.jsonl") if row.id in chosen), key=lambda row: row.id
    )
    return find_trained(
        rows[:most], [row for window in read_windows(tokens / "train.arrow") for row in rows_of(window)], chat
    )


def _read_line(line: bytes) -> Any:
    return msgspec.json.decode(line)


def _main(config: Config, arguments: argparse.Namespace) -> None:
    started = time.perf_counter()
    report = parity(
        arguments.prepared, arguments.tokens, arguments.base, arguments.candidate, arguments.out, config
    )
    for part in report.parts:
        say(f"parity: {part.result:4} {part.reason}")
    seconds = time.perf_counter() - started
    say(f"parity: {report.rows} test rows and {report.training_rows} training rows in {seconds:.0f} s")


if __name__ == "__main__":
    run_stage(__doc__, ["prepared", "tokens", "base", "candidate", "out"], _main)
