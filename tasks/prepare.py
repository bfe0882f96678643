"""Raw batches in, splits out, and every row accounted for.

    python -m tasks.prepare --raw data/raw --golden data/golden.jsonl --out data/prepared

Writes train, validation, test, golden and rejected (JSON Lines) and profile.json. Rows in = accepted + rejected +
duplicates, per batch and in all. Not covered yet: personal data and secrets.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from ratchet.batches import Batch, check_batch, raw_lines, read_manifest
from ratchet.config import Config, PrepareConfig
from ratchet.errors import DataError
from ratchet.examples import Example, Meta, RowError, encode_line, make_example, recognise_form, row_to_messages
from ratchet.files import whole_folder, write_bytes, write_json
from ratchet.neighbours import Clusters
from ratchet.sources.jsonl import MAX_LINE
from ratchet.stage import run_stage, say

SPLITS = ("train", "validation", "test")


class Rejection(msgspec.Struct, frozen=True):
    """A row that was not taken. The content itself stays in the batch."""

    batch: str
    line: int
    reason: str
    message: str


class Prepared:
    """What has been sorted so far."""

    def __init__(self, config: PrepareConfig) -> None:
        self.rows: dict[str, list[Example]] = {split: [] for split in (*SPLITS, "golden")}
        self.rejected: list[Rejection] = []
        self.counts: dict[str, Counter[str]] = {}
        self._config = config
        self._clusters = Clusters(config)
        self._seen: set[str] = set()

    def add_golden(self, path: Path) -> None:
        """Golden rows come first: whatever is near to one of them stays out of every split."""
        for number, line in raw_lines(path) if path.exists() else []:
            try:
                example = self._parse(line, "auto", {"batch": "golden"})
            except RowError as error:
                raise DataError(f"{path}:{number} ({error.reason}): {error}", remedy="the golden set is frozen and small: mend the row by hand") from None
            if example.id in self._seen:
                raise DataError(f"{path}:{number} stands there twice: it would count twice in every comparison", remedy="take one of the two out")
            self._clusters.place(example, "golden")
            self._seen.add(example.id)
            self.rows["golden"].append(example)

    def add_batch(self, path: Path, batch: Batch) -> None:
        counts = self.counts.setdefault(batch.name, Counter())
        form = batch.form
        for number, line in raw_lines(path):
            counts["rows"] += 1
            try:
                example = self._parse(line, form, {"batch": batch.name, "source": batch.source})
            except RowError as error:
                counts[f"rejected.{error.reason}"] += 1
                self.rejected.append(Rejection(batch.name, number, error.reason, str(error)))
                continue
            counts[self._sort(example, batch.name, number)] += 1

    def _sort(self, example: Example, batch: str, line: int) -> str:
        """Name of the counter that the row falls under."""
        if example.id in self._seen:
            return "duplicate.exact"
        placed = self._clusters.place(example)
        if placed.side == "golden":
            return "duplicate.near_golden"
        if placed.side == "straddles":
            self.rejected.append(Rejection(batch, line, "straddles", f"near to rows of two splits, one of them {placed.near}: it would leak between them"))
            return "rejected.straddles"
        self._seen.add(example.id)
        self.rows[placed.side].append(example)
        return f"accepted.{placed.side}"

    def _parse(self, line: bytes, form: str, meta: Meta) -> Example:
        if len(line) >= MAX_LINE:
            raise RowError("line_too_long", f"the line has 1 MiB or more; at most {MAX_LINE - 1} bytes are read")
        try:
            row = msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RowError("invalid_json", f"no valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise RowError("no_object", f"a {type(row).__name__}, wanted an object")
        messages = row_to_messages(row, recognise_form(row) if form == "auto" else form)
        given = row.get("meta")
        kept: Meta = {key: value for key, value in given.items() if isinstance(value, str | int | float | bool)} if isinstance(given, dict) else {}
        example = make_example(messages, {**kept, **meta})
        length = sum(len(message.content) for message in example.messages)
        if length > self._config.max_chars:
            raise RowError("too_many_chars", f"{length} characters; `prepare.max_chars` is {self._config.max_chars}")
        return example


def prepare(raw: Path, golden: Path, out: Path, config: PrepareConfig) -> dict[str, Any]:
    """Returns the profile. Raises DataError: no batch, a batch that is not what the manifest says, too many rejected rows, too few left."""
    manifest = read_manifest(raw)
    if not manifest:
        raise DataError(f"{raw} holds no batch", remedy="ratchet ingest")
    prepared = Prepared(config)
    prepared.add_golden(golden)
    for batch in manifest:
        prepared.add_batch(check_batch(raw, batch), batch)
    profile = _profile(prepared)
    with whole_folder(out) as folder:
        for split, examples in prepared.rows.items():
            write_bytes(folder / f"{split}.jsonl", map(encode_line, examples))
        write_bytes(folder / "rejected.jsonl", map(encode_line, prepared.rejected))
        write_json(folder / "profile.json", profile)
    _check_limits(profile, prepared, config)
    return profile


def _profile(prepared: Prepared) -> dict[str, Any]:
    total: Counter[str] = Counter()
    for counts in prepared.counts.values():
        total.update(counts)
    profile = {"total": _sorted_counts(total), "batches": {name: _sorted_counts(counts) for name, counts in prepared.counts.items()}, "golden": len(prepared.rows["golden"])}
    kinds = Counter((split, str(example.meta.get("kind", ""))) for split in SPLITS for example in prepared.rows[split])
    profile["kinds"] = {split: {kind: count for (of, kind), count in sorted(kinds.items()) if of == split} for split in SPLITS}
    return profile


def _sorted_counts(counts: Counter[str]) -> dict[str, Any]:
    """rows = accepted + rejected + duplicate, each with its parts."""
    groups: dict[str, Any] = {"rows": counts["rows"]}
    for group in ("accepted", "rejected", "duplicate"):
        parts = {name.partition(".")[2]: count for name, count in sorted(counts.items()) if name.startswith(f"{group}.")}
        groups[group] = {"rows": sum(parts.values()), **parts}
    assert groups["rows"] == sum(groups[group]["rows"] for group in ("accepted", "rejected", "duplicate")), groups
    return groups


def _check_limits(profile: dict[str, Any], prepared: Prepared, config: PrepareConfig) -> None:
    for name, counts in [("all batches", profile["total"]), *profile["batches"].items()]:
        rejected = {reason: count for reason, count in counts["rejected"].items() if reason != "rows"}
        if counts["rejected"]["rows"] > config.max_rejected_share * counts["rows"]:
            first = next(row for row in prepared.rejected if name in ("all batches", row.batch))
            raise DataError(
                f"{counts['rejected']['rows']} of {counts['rows']} rows of {name} are rejected ({rejected}); `prepare.max_rejected_share` is {config.max_rejected_share}. "
                f"The first: {first.batch}:{first.line}: {first.message}",
                remedy="mend the source and take the batch back (git revert its commit), or raise the limit; rejected.jsonl lists every row with its reason",
            )
    accepted = profile["total"]["accepted"].get("train", 0)
    if accepted < config.min_rows:
        raise DataError(f"{accepted} training rows are left of {profile['total']['rows']}; `prepare.min_rows` is {config.min_rows}", remedy="ingest more rows, or lower the limit")


def _main(config: Config, arguments: argparse.Namespace) -> None:
    total = prepare(arguments.raw, arguments.golden, arguments.out, config.prepare)["total"]
    parts = ", ".join(f"{group} {total[group]['rows']}" for group in ("accepted", "rejected", "duplicate"))
    splits = ", ".join(f"{split} {total['accepted'].get(split, 0)}" for split in SPLITS)
    say(f"prepare: {total['rows']} rows = {parts}; splits: {splits}")


if __name__ == "__main__":
    run_stage(__doc__, ["raw", "golden", "out"], _main)
