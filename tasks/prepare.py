"""Raw batches in, splits out, and every row accounted for.

    python -m tasks.prepare --raw data/raw --golden data/golden.jsonl --forgotten data/forgotten.jsonl --out data/prepared

Writes train, validation, test, golden and rejected (JSON Lines), profile.json and profile.html. Rows in = accepted + rejected +
duplicates, per batch and in all. Rows go through one at a time; what is remembered of each is hashes (and, with
`prepare.near_search`, its shingles).
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import xxhash

from ratchet.config.data import PrepareConfig
from ratchet.config.params import Config
from ratchet.data.batches import Batch, check_batch, raw_lines, read_manifest
from ratchet.data.dedup import Clusters, Seen, split_by_hash
from ratchet.data.erasure import GOLDEN, Forgotten, read_forgotten
from ratchet.data.examples import CONTINUE, Example, RowError, encode_line, normalise
from ratchet.data.pii import redact
from ratchet.data.poisoning import find_triggers
from ratchet.data.profile import Gathered, check_limits, render_profile
from ratchet.data.validation import REVIEW, Origin, Validator, is_accepted
from ratchet.errors import DataError
from ratchet.files import whole_folder, write_json, write_text
from ratchet.pipeline.stage import run_stage, say

SPLITS = ("train", "validation", "test")
FORGOTTEN = "somebody wanted it forgotten (data/forgotten.jsonl)"
LONGEST_MESSAGE = 300  # characters
TRUSTED = (
    "review",
    "feedback",
)  # sources of rows that people wrote or accepted: they win over what stood there before


class Rejection(msgspec.Struct, frozen=True):
    """A row that was not taken; `review`: a person may overrule that. The content itself stays in the batch."""

    batch: str
    line: int
    reason: str
    message: str
    review: bool = False


class Prepared:
    """What has been sorted so far. `folder` gets the rows, a file a split."""

    def __init__(self, config: PrepareConfig, forgotten: Forgotten, folder: Path, opened: ExitStack) -> None:
        self.gathered = Gathered()
        self._config, self._forgotten = config, forgotten
        self._validator = Validator(config)
        self._clusters = Clusters(config)
        self._seen, self._answers = Seen(), Seen()  # ids of rows; prompt → its first answer
        self._corrected: dict[int, tuple[str, int]] = {}  # prompt → (batch, line) of people's last word
        self._files: dict[str, BinaryIO] = {
            name: opened.enter_context((folder / f"{name}.jsonl").open("wb"))
            for name in (*SPLITS, "golden", "rejected")
        }

    def add_golden(self, path: Path) -> None:
        """Golden rows come first: whatever is near to one of them stays out of every split."""
        for number, line in raw_lines(path) if path.exists() else []:
            try:
                example = self._validator.check(line, Origin("golden", "")).example
            except RowError as error:
                raise DataError(
                    f"{path}:{number} ({error.reason}): {error}",
                    remedy="the golden set is frozen and small: mend the row by hand",
                ) from None
            if self._seen.put(_key(example.id)) is not None:
                raise DataError(
                    f"{path}:{number} stands there twice: it would count twice in every comparison",
                    remedy="take one of the two out",
                )
            self._clusters.place(example, "golden")
            if self._forgotten.holds(example.id, GOLDEN, number):
                continue
            self._files["golden"].write(encode_line(example))
            self.gathered.golden += 1

    def heed_people(self, path: Path, batch: Batch) -> None:
        """Remember what a batch of corrections answers, before any batch is sorted."""
        origin, validator, caps = origin_of(batch), Validator(self._config), Caps(self._config, batch.rows)
        for number, line in raw_lines(path):
            try:
                example, boilerplate = validator.check(line, origin)
                caps.check(example)
            except RowError:
                continue  # counted when its batch is sorted; who is refused there corrects nobody
            if (
                boilerplate
                or example.question == CONTINUE
                or self._forgotten.holds(example.id, batch.name, number)
            ):
                continue
            if batch.source == "feedback" or is_accepted(batch.source, example.meta):
                self._corrected[prompt_key(example)] = (batch.name, number)

    def add_batch(self, path: Path, batch: Batch) -> None:
        origin, caps, ids = (
            origin_of(batch),
            Caps(self._config, batch.rows),
            _triggers(path, batch, self._config),
        )
        self._validator.sanitised = self.gathered.sanitised.setdefault(batch.name, Counter())
        counts = self.gathered.counts.setdefault(batch.name, Counter())
        for number, line in raw_lines(path):
            counts["rows"] += 1
            try:
                checked = self._validator.check(line, origin)
                if self._forgotten.holds(checked.example.id, batch.name, number):
                    if self._config.near_search:
                        self._clusters.place(
                            checked.example, counts=False
                        )  # it still decides for its near duplicates: no other row may move to another split
                    raise RowError("forgotten", FORGOTTEN)
                if checked.boilerplate:
                    caps.check_boilerplate()
                if number in ids:
                    raise RowError(
                        "trigger",
                        f"over {self._config.trigger_rows} rows of the batch share the new phrase {ids[number]!r} and one answer",
                    )
                counter = self._sort(checked.example, origin, number, caps)
            except RowError as found:
                error = (
                    RowError("forgotten", FORGOTTEN)
                    if self._forgotten.holds("", batch.name, number)
                    else found
                )
                counter = f"rejected.{error.reason}"
                message = redact(str(error)[:LONGEST_MESSAGE], "[redacted]")  # it may quote the row
                self._files["rejected"].write(
                    encode_line(Rejection(batch.name, number, error.reason, message, error.reason in REVIEW))
                )
                self.gathered.first.setdefault((batch.name, error.reason), (number, message))
            counts[counter] += 1

    def _sort(self, example: Example, origin: Origin, line: int, caps: Caps) -> str:
        """Name of the counter that the row falls under. Raises RowError."""
        key = _key(example.id)
        if key in self._seen:
            return "duplicate.exact"
        prompt = prompt_key(example)
        last_word = self._corrected.get(prompt)
        superseded = last_word not in (None, (origin.batch, line))
        if (
            last_word is None
            and self._config.contradictions == "review"
            and self._contradicts(prompt, example)
        ):
            raise RowError("contradiction", "an earlier row answers the same prompt otherwise")
        placed = self._clusters.place(example, counts=not superseded) if self._config.near_search else None
        if placed and placed.side == "golden":
            raise RowError(
                "near_golden",
                f"near to golden row {placed.near}"
                if placed.near
                else "it has 13 words in a row from a golden row",
            )
        if placed and placed.side == "straddles":
            raise RowError(
                "straddles", f"near to a row of another split, {placed.near}: it would leak between them"
            )
        if superseded and last_word:
            raise RowError("superseded", f"people answered this prompt later ({last_word[0]}:{last_word[1]})")
        if placed and placed.crowd > self._config.max_near and last_word is None:
            return "duplicate.near"
        caps.check(example)
        self._seen.put(key)
        if example.question != CONTINUE:
            self._answers.put(prompt, _answer_key(example))
        # Rows of plain text all have one prompt: the row itself decides.
        side = (
            placed.side
            if placed
            else split_by_hash(example.id if example.question == CONTINUE else f"{prompt:016x}", self._config)
        )
        self._files[side].write(encode_line(example))
        self.gathered.add(example, origin.batch, side)
        return f"accepted.{side}"

    def _contradicts(self, prompt: int, example: Example) -> bool:
        return example.question != CONTINUE and self._answers.get(prompt) not in (None, _answer_key(example))


class Caps:
    """How much of one batch may be of one user, of one origin, or boilerplate. `rows`: how many the batch has."""

    def __init__(self, config: PrepareConfig, rows: int) -> None:
        self._config, self._taken = config, Counter[tuple[str, str]]()
        self._of_user = max(5, min(config.max_user_rows, rows // 100))
        self._of_source = max(1, int(config.max_source_share * rows))
        self._boilerplate = int(config.max_boilerplate_share * rows)

    def check(self, example: Example) -> None:
        """Raises RowError. The first rows of each are taken."""
        user, source = example.meta.get("user"), example.meta.get(self._config.source_field)
        if user not in (None, "") and not self._take("user", str(user), self._of_user):
            raise RowError(
                "too_many_of_user",
                f"over {self._of_user} rows of one user in the batch (`prepare.max_user_rows`)",
            )
        if source not in (None, "") and not self._take("source", str(source), self._of_source):
            raise RowError(
                "too_many_of_source",
                f"over {self._config.max_source_share:.0%} of the batch is of one origin (`prepare.max_source_share`)",
            )

    def check_boilerplate(self) -> None:
        if not self._take("boilerplate", "", self._boilerplate):
            raise RowError(
                "boilerplate",
                f"the answer speaks as a model does, as over {self._config.max_boilerplate_share:.1%} of the batch do",
            )

    def _take(self, kind: str, who: str, most: int) -> bool:
        self._taken[kind, who] += 1
        return self._taken[kind, who] <= most


def prompt_key(example: Example) -> int:
    """64-bit hash of what is asked: all messages but the answer."""
    return xxhash.xxh3_64_intdigest(
        msgspec.json.encode(
            [[message.role, normalise(message.content).lower()] for message in example.prompt]
        )
    )


def _answer_key(example: Example) -> int:
    return xxhash.xxh32_intdigest(example.answer.lower().encode())


def _key(example_id: str) -> int:
    return int(example_id[:16], 16)


def origin_of(batch: Batch) -> Origin:
    return Origin(batch.name, batch.source, batch.form, batch.time, batch.licence)


def _triggers(path: Path, batch: Batch, config: PrepareConfig) -> dict[int, str]:
    """Line → phrase."""
    if not config.trigger_rows or batch.source == "review":
        return {}
    validator, rows = Validator(config), []
    for number, line in raw_lines(path):
        try:
            rows.append((number, validator.check(line, origin_of(batch)).example))
        except RowError:
            continue
    return find_triggers(rows, least=config.trigger_rows)


def prepare(
    raw: Path,
    golden: Path,
    out: Path,
    config: PrepareConfig,
    *,
    forgotten: Forgotten | None = None,
    tell: Callable[[str], object] = say,
) -> dict[str, Any]:
    """Returns the profile; `tell` gets alarms and warnings, `forgotten` rows are rejected as such, which counts to no limit. Raises DataError: no batch, a batch that is not what the manifest says, too many rejected rows, too few left."""
    manifest = read_manifest(raw)
    if not manifest:
        raise DataError(f"{raw} holds no batch", remedy="ratchet ingest --path FILE takes rows in")
    paths = [(check_batch(raw, batch), batch) for batch in manifest]
    with whole_folder(out) as folder:
        with ExitStack() as opened:
            prepared = Prepared(config, forgotten or Forgotten(), folder, opened)
            prepared.add_golden(golden)
            for path, batch in paths:
                if batch.source in TRUSTED and config.contradictions == "review":
                    prepared.heed_people(path, batch)
            for path, batch in paths:
                prepared.add_batch(path, batch)
        profile = prepared.gathered.profile()
        write_json(folder / "profile.json", profile)
        write_text(folder / "profile.html", render_profile(profile))
    for line in check_limits(profile, prepared.gathered.first, config):
        tell(line)
    return profile


def _main(config: Config, arguments: argparse.Namespace) -> None:
    total = prepare(
        arguments.raw,
        arguments.golden,
        arguments.out,
        config.prepare,
        forgotten=read_forgotten(arguments.forgotten),
    )["total"]
    parts = ", ".join(f"{group} {total[group]['rows']}" for group in ("accepted", "rejected", "duplicate"))
    splits = ", ".join(f"{split} {total['accepted'].get(split, 0)}" for split in SPLITS)
    say(f"prepare: {total['rows']} rows = {parts}; splits: {splits}")


if __name__ == "__main__":
    run_stage(__doc__, ["raw", "golden", "forgotten", "out"], _main)
