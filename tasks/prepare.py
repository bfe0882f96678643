"""Sort the rows of raw batches into splits, and account for every row.

    python -m tasks.prepare --raw data/raw --golden data/golden.jsonl --forgotten data/forgotten.jsonl \\
        --out data/prepared

Writes train, validation, test, golden and rejected (JSON Lines), profile.json and profile.html. Undesirable
answers (`label: false`) go into a file beside each split, such as undesirable_train. Pictures that the rows
show go into media/BATCH.tar and media/golden.tar. Rows in = accepted + rejected + duplicates, per batch and
in total. Rows go through one at a time, except for batches of people's corrections and with
`prepare.trigger_rows`, where a batch is held in memory. Of a sorted row only hashes are remembered (and, with
`prepare.near_search`, its shingles).
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import msgspec
import xxhash

from ratchet.config.data import PrepareConfig
from ratchet.config.params import Config
from ratchet.data.batches import Batch, batch_media, check_batch, raw_lines, read_manifest
from ratchet.data.dedup import RUN, Clusters, HashTable, Placed, Split, split_by_hash
from ratchet.data.erasure import GOLDEN, Forgotten, read_forgotten
from ratchet.data.examples import CONTINUE, Example, RowError, encode_line, prompt_key
from ratchet.data.mixture import undesirable
from ratchet.data.pii import redact
from ratchet.data.poisoning import find_triggers
from ratchet.data.profile import SPLITS, Gathered, Profile, check_limits, render_profile
from ratchet.data.sharded import ShardedRows, Source, shard_rows
from ratchet.data.validation import REVIEW, Checked, Origin, Validator, check_lines, is_accepted
from ratchet.errors import DataError
from ratchet.files import sha256_file, whole_folder, write_json, write_text
from ratchet.media.names import is_sound, kind_of
from ratchet.media.pictures import look_at
from ratchet.media.sounds import hash_of_samples
from ratchet.media.store import FOLDER, MediaStore, write_shard
from ratchet.pipeline.stage import project_root, run_stage, say

FORGOTTEN = "the row is on the erasure list (data/forgotten.jsonl)"
LONGEST_MESSAGE = 300  # characters
HOME = Path(".ratchet/prepare")  # of the workers of `prepare.engine: datatrove`
# Sources of rows that people wrote or accepted: they win over other answers to the same prompt.
TRUSTED = ("review", "feedback")


class Rejection(msgspec.Struct, frozen=True):
    """A rejected row, without its content, which stays only in the batch.

    `review`: a person may overrule the rejection.
    """

    batch: str
    line: int
    reason: str
    message: str
    review: bool = False


class Incoming(NamedTuple):
    """A batch to sort. `lines` can be read only once; `rows` is their number, `media` their pictures."""

    origin: Origin
    rows: int
    lines: Iterable[tuple[int, bytes]]
    media: Mapping[str, bytes] = MappingProxyType({})


Keep = Callable[
    [str, Example | Rejection], object
]  # called with a file's name (a split, undesirable_SPLIT, "golden" or "rejected") and a row
Validated = Iterable[tuple[int, Checked | RowError]]  # (line number, result)


def prepare(
    raw: Path,
    golden: Path,
    out: Path,
    config: PrepareConfig,
    *,
    forgotten: Forgotten | None = None,
    tell: Callable[[str], object] = say,
    home: Path | None = None,
) -> Profile:
    """Sort the batches of `raw` into splits under `out`.

    `tell` is called with alarms and warnings. `forgotten` rows are rejected, which counts towards no limit.
    `home` is where the workers of `prepare.engine: datatrove` keep what they made; by default beside `out`.
    Raises DataError when there is no batch, when a batch is not what the manifest says, or when too many rows
    are rejected or too few are left.
    """
    manifest = read_manifest(raw)
    if not manifest:
        raise DataError(f"{raw} holds no batch", remedy="ratchet ingest --path FILE takes rows in")
    batches = [
        Incoming(origin_of(batch), batch.rows, raw_lines(check_batch(raw, batch)), batch_media(raw, batch))
        for batch in manifest
    ]
    shown: dict[str, set[str]] = {}  # batch → names of pictures
    sharded = None
    if config.engine == "datatrove":
        sources = [Source(origin_of(batch), raw / batch.name, batch.sha256) for batch in manifest]
        if golden.exists():
            sources.insert(0, Source(Origin(GOLDEN, ""), golden, sha256_file(golden)))
        sharded = shard_rows(sources, config, home or out.with_name(".prepare"), tell)

    with whole_folder(out) as folder:
        with ExitStack() as opened:
            files = {
                name: opened.enter_context((folder / f"{name}.jsonl").open("wb"))
                for name in (*SPLITS, *map(undesirable, SPLITS), GOLDEN, "rejected")
            }

            def keep(name: str, row: Example | Rejection) -> None:
                files[name].write(encode_line(row))
                if isinstance(row, Example) and row.media:
                    shown.setdefault(str(row.meta["batch"]), set()).update(row.media)

            gathered = sort_batches(batches, golden, config, forgotten or Forgotten(), keep, sharded)
        stores = {batch.origin.batch: batch.media for batch in batches} | {GOLDEN: golden_media(golden)}
        for batch, names in shown.items():
            write_shard(folder / FOLDER / f"{batch.removesuffix('.jsonl')}.tar", stores[batch], names)
        profile = gathered.profile()
        write_json(folder / "profile.json", msgspec.to_builtins(profile))
        write_text(folder / "profile.html", render_profile(profile))
    for line in check_limits(profile, gathered.first, config):
        tell(line)
    if sharded:
        sharded.clear()
    return profile


def golden_media(golden: Path) -> MediaStore:
    """Return the pictures of the golden rows, which stand in a tar beside them."""
    return MediaStore([golden.with_suffix(".tar")])


def sort_batches(
    batches: list[Incoming],
    golden: Path,
    config: PrepareConfig,
    forgotten: Forgotten,
    keep: Keep,
    sharded: ShardedRows | None = None,
) -> Gathered:
    """Validate each row once, and pass it to `keep`. Raises DataError for an unfit golden row.

    `sharded` holds what workers found about the rows of the same batches.
    Batches that people wrote are held as lists, because what they correct has to be known before any row is
    sorted; they are small. Rows of other batches go through one at a time.
    """
    sorter = Sorter(config, forgotten, keep, sharded)
    sorter.add_golden(golden)
    waiting: list[tuple[Incoming, Validated]] = []
    for batch in batches:
        rows: Validated = sorter.validate(batch)
        if batch.origin.source in TRUSTED and config.contradictions == "review":
            rows = list(rows)
            sorter.heed_people(batch, rows)
        waiting.append((batch, rows))
    for batch, rows in waiting:
        sorter.add_batch(batch, rows)
    return sorter.gathered


class Sorter:
    """What is kept of a sorted row: two hash table slots of 12 bytes, with `near_search` about 1 kB more."""

    def __init__(
        self, config: PrepareConfig, forgotten: Forgotten, keep: Keep, sharded: ShardedRows | None = None
    ) -> None:
        self.gathered = Gathered()
        self._sharded = sharded
        self._config, self._forgotten, self._keep = config, forgotten, keep
        self._validator = Validator(config)
        self._clusters = Clusters(config, sharded.near if sharded and config.near_search else None)
        self._seen, self._answers = HashTable(), HashTable()  # ids of rows; prompt → its first answer
        self._corrected: dict[int, tuple[str, int]] = {}  # prompt → (batch, line) of people's last answer

    def add_golden(self, path: Path) -> None:
        """Place the golden rows, before any other, so that rows near to one of them stay out of every split.

        Raises DataError for a golden row that is unfit, undesirable or there twice.
        """
        batch = Incoming(Origin(GOLDEN, ""), 0, (), golden_media(path))
        for number, line in raw_lines(path) if path.exists() else []:
            try:
                checked = self._validator.check(line, batch.origin)
                self._look_at_media(checked, batch)
                example = checked.example
            except RowError as error:
                raise DataError(
                    f"{path}:{number} ({error.reason}): {error}",
                    remedy="the golden set is frozen and small: mend the row by hand",
                ) from None
            if not example.desirable:
                raise DataError(
                    f"{path}:{number}: `label` is false, and a golden row is asked for its right answer",
                    remedy="take the row out of the golden set, or give it the right answer",
                )
            if self._seen.put(_key(example.id)) is not None:
                raise DataError(
                    f"{path}:{number} stands there twice: it would count twice in every comparison",
                    remedy="take one of the two out",
                )
            self._clusters.place(example, "golden")
            if self._forgotten.holds(example.id, GOLDEN, number):
                continue
            self._keep(GOLDEN, example)
            self.gathered.golden += 1

    def validate(self, batch: Incoming) -> Iterator[tuple[int, Checked | RowError]]:
        """Yield each row of the batch, checked here or by workers, once its pictures were looked at."""
        if self._sharded:
            found = self._sharded.of(batch.origin.batch)
        else:
            found = check_lines(self._validator, batch.lines, batch.origin)
        for number, checked in found:
            try:
                if isinstance(checked, Checked):
                    self._look_at_media(checked, batch)
                yield number, checked
            except RowError as error:
                yield number, error

    def _look_at_media(self, checked: Checked, batch: Incoming) -> None:
        """Remember what the row's pictures and recordings show. Raises RowError for one that is missing."""
        for name in checked.example.media:
            if name not in batch.media:
                raise RowError("media_missing", f"no {kind_of(name)} {name[:12]}… came with the batch")
            if is_sound(name) and not self._clusters.gallery.knows(name):
                self._clusters.gallery.hear(name, hash_of_samples(batch.media[name]))
            if not self._clusters.gallery.knows(name):
                alike = self._config.picture_distance >= 0
                self._clusters.gallery.learn(name, look_at(batch.media[name]) if alike else None)

    def heed_people(self, batch: Incoming, rows: Validated) -> None:
        """Remember which prompts a batch of corrections answers, before any batch is sorted."""
        origin, caps = batch.origin, Caps(self._config, batch.rows)
        for number, checked in rows:
            if isinstance(checked, RowError):
                continue  # counted when its batch is sorted
            example = checked.example
            try:
                caps.check(example)
            except RowError:
                continue  # a row over a cap will be rejected, so it corrects nothing
            if checked.boilerplate or example.question == CONTINUE or not example.desirable:
                continue
            if self._forgotten.holds(example.id, origin.batch, number):
                continue
            if origin.source == "feedback" or is_accepted(origin.source, example.meta):
                self._corrected[prompt_key(example)] = (origin.batch, number)

    def add_batch(self, batch: Incoming, rows: Validated) -> None:
        """Sort and count each row of a batch."""
        name, caps, phrases = batch.origin.batch, Caps(self._config, batch.rows), dict[int, str]()
        if self._config.trigger_rows and batch.origin.source != "review":
            rows = list(rows)  # a planted phrase shows only over many rows
            fit = [(number, found.example) for number, found in rows if isinstance(found, Checked)]
            phrases = find_triggers(fit, least=self._config.trigger_rows)
        counts = self.gathered.counts.setdefault(name, Counter())
        sanitised = self.gathered.sanitised.setdefault(name, Counter())
        for number, checked in rows:
            counts["rows"] += 1
            try:
                if isinstance(checked, RowError):
                    raise checked
                sanitised.update(checked.sanitised)
                self._check_row(checked, name, number, caps, phrases.get(number))
                counter = self._sort(checked.example, batch.origin, number, caps)
            except RowError as error:
                counter = self._reject(name, number, error)
            counts[counter] += 1

    def _check_row(self, checked: Checked, batch: str, line: int, caps: Caps, phrase: str | None) -> None:
        """Raise RowError for a row on the erasure list, boilerplate over its cap, or a planted `phrase`."""
        if self._forgotten.holds(checked.example.id, batch, line):
            if self._config.near_search:
                # The row still decides the split of its near duplicates, so that none of them moves.
                self._clusters.place(checked.example, counts=False)
            raise RowError("forgotten", FORGOTTEN)
        if checked.boilerplate:
            caps.check_boilerplate()
        if phrase is not None:
            raise RowError(
                "trigger",
                f"over {self._config.trigger_rows} rows of the batch share the new phrase {phrase!r} "
                "and one answer",
            )

    def _reject(self, batch: str, line: int, error: RowError) -> str:
        """Record the rejection, and return the name of the row's counter."""
        if self._forgotten.holds("", batch, line):  # a row that is no example has a place but no id
            error = RowError("forgotten", FORGOTTEN)
        message = redact(str(error)[:LONGEST_MESSAGE], "[redacted]")  # the message may quote the row
        self._keep("rejected", Rejection(batch, line, error.reason, message, error.reason in REVIEW))
        self.gathered.first.setdefault((batch, error.reason), (line, message))
        return f"rejected.{error.reason}"

    def _sort(self, example: Example, origin: Origin, line: int, caps: Caps) -> str:
        """Choose the row's split, keep the row, and return the name of its counter. Raises RowError."""
        key = _key(example.id)
        if key in self._seen:
            return "duplicate.exact"
        if not example.desirable:
            return self._sort_undesirable(example, key, caps, held_out=origin.held_out)
        prompt = prompt_key(example)
        last_word = self._corrected.get(prompt)
        superseded = last_word not in (None, (origin.batch, line))
        doubted = last_word is None and self._config.contradictions == "review"
        if doubted and self._contradicts(prompt, example):
            raise RowError("contradiction", "an earlier row answers the same prompt differently")
        # Placed before it is refused: a superseded row still decides the split of its near duplicates.
        placed = self._place(example, counts=not superseded, held_out=origin.held_out)
        if superseded and last_word:
            raise RowError("superseded", f"people answered this prompt later ({last_word[0]}:{last_word[1]})")
        if placed and (
            placed.side == "straddles" or (placed.crowd > self._config.max_near and last_word is None)
        ):
            return "duplicate.near"
        caps.check(example)
        self._seen.put(key)
        if example.question != CONTINUE:
            self._answers.put(prompt, _answer_key(example))
        side = self._side(example, placed, held_out=origin.held_out)
        self._keep(side, example)
        self.gathered.add(example, origin.batch, side)
        return f"accepted.{side}"

    def _sort_undesirable(self, example: Example, key: int, caps: Caps, *, held_out: bool) -> str:
        """Keep an undesirable answer in the file beside the split of its prompt.

        It neither contradicts nor supersedes other answers to its prompt.
        """
        placed = self._place(example, counts=False, held_out=held_out)
        if placed and placed.side == "straddles":
            return "duplicate.near"
        side = self._side(example, placed, held_out=held_out)
        caps.check(example)
        self._seen.put(key)
        self._keep(undesirable(side), example)
        return f"accepted.{undesirable(side)}"

    def _place(self, example: Example, *, counts: bool, held_out: bool) -> Placed | None:
        """Find near rows. Raises RowError for a row that would leak from the golden set or between splits.

        A row of a held-out batch that is near to a learned one straddles too; it counts as its duplicate.
        """
        wanted: Split | None = "test" if held_out else None
        if self._config.near_search:
            placed = self._clusters.place(example, counts=counts, wanted=wanted)
        elif example.media:
            placed = self._clusters.place_by_pictures(example, self._own(example), wanted=wanted)
        else:
            return None
        if placed.side == "golden":
            quoted = f"it has {RUN} words in a row from a golden row"
            raise RowError("near_golden", f"near to golden row {placed.near}" if placed.near else quoted)
        if placed.side == "straddles" and not held_out:
            raise RowError(
                "straddles", f"near to a row of another split, {placed.near}: it would leak between them"
            )
        return placed

    def _side(self, example: Example, placed: Placed | None, *, held_out: bool) -> str:
        if placed:
            return placed.side
        return "test" if held_out else split_by_hash(self._own(example), self._config)

    def _own(self, example: Example) -> str:
        # Rows of plain text all have the same prompt (CONTINUE), so the row's own id decides.
        return example.id if example.question == CONTINUE else f"{prompt_key(example):016x}"

    def _contradicts(self, prompt: int, example: Example) -> bool:
        return example.question != CONTINUE and self._answers.get(prompt) not in (None, _answer_key(example))


class Caps:
    """Limits on how much of a batch of `rows` rows may be of one user, of one origin, or boilerplate."""

    def __init__(self, config: PrepareConfig, rows: int) -> None:
        self._config, self._taken = config, Counter[tuple[str, str]]()
        # A hundredth of the batch, but at least 5, so that small batches keep some rows of each user.
        self._of_user = max(5, min(config.max_user_rows, rows // 100))
        self._of_source = max(1, int(config.max_source_share * rows))
        self._boilerplate = int(config.max_boilerplate_share * rows)

    def check(self, example: Example) -> None:
        """Count the row for its user and its origin. Raises RowError when it is over one of the caps."""
        user, source = example.meta.get("user"), example.meta.get(self._config.source_field)
        if user not in (None, "") and not self._take("user", str(user), self._of_user):
            raise RowError(
                "too_many_of_user",
                f"over {self._of_user} rows of one user in the batch (`prepare.max_user_rows`)",
            )
        if source not in (None, "") and not self._take("source", str(source), self._of_source):
            raise RowError(
                "too_many_of_source",
                f"over {self._config.max_source_share:.0%} of the batch is of one origin "
                "(`prepare.max_source_share`)",
            )

    def check_boilerplate(self) -> None:
        if not self._take("boilerplate", "", self._boilerplate):
            raise RowError(
                "boilerplate",
                "the answer speaks of itself as a language model, "
                f"as do over {self._config.max_boilerplate_share:.1%} of the batch's answers",
            )

    def _take(self, kind: str, who: str, most: int) -> bool:
        self._taken[kind, who] += 1
        return self._taken[kind, who] <= most


def _answer_key(example: Example) -> int:
    return xxhash.xxh32_intdigest(example.answer.lower().encode())


def _key(example_id: str) -> int:
    return int(example_id[:16], 16)


def origin_of(batch: Batch) -> Origin:
    return Origin(batch.name, batch.source, batch.form, batch.time, batch.licence, batch.held_out, batch.like)


def _main(config: Config, arguments: argparse.Namespace) -> None:
    total = prepare(
        arguments.raw,
        arguments.golden,
        arguments.out,
        config.prepare,
        forgotten=read_forgotten(arguments.forgotten),
        home=project_root() / HOME,  # not the workspace, which is removed: what workers did is kept
    ).total
    splits = ", ".join(f"{split} {total.accepted.get(split, 0)}" for split in SPLITS)
    if bad := sum(total.accepted.get(undesirable(split), 0) for split in SPLITS):
        splits += f"; {bad} answers not to give"
    say(
        f"prepare: {total.rows} rows = accepted {total.accepted['rows']}, rejected {total.rejected['rows']}, "
        f"duplicate {total.duplicate['rows']}; splits: {splits}"
    )


if __name__ == "__main__":
    run_stage(__doc__, ["raw", "golden", "forgotten", "out"], _main)
