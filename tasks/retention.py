"""Fill the empty cells of the retention table: ask versions the rows that they were never asked, and keep
their scores.

This is not a stage and changes no stage's output. Filled cells are kept, and answers are cached
(`ratchet.evaluation.answer_cache`), so a second run costs nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from ratchet.config.params import Config
from ratchet.data.examples import Example, counted_in, read_examples
from ratchet.errors import CheckoutError, RatchetError
from ratchet.evaluation.answer_cache import FOLDER as ANSWERS
from ratchet.evaluation.answer_cache import forget_oldest
from ratchet.evaluation.custom_metrics import load_custom
from ratchet.evaluation.scoring import Asked, Models, Player, add_scores, answer, frame_of
from ratchet.files import write_json
from ratchet.media.store import FOLDER as MEDIA
from ratchet.media.store import MediaStore
from ratchet.models.loading import adapter_sha256
from ratchet.pipeline.workspace import require_output
from ratchet.reporting.retention import (
    Cell,
    Evaluation,
    Retention,
    VersionRow,
    cells_of,
    filled_file,
    read_filled,
    read_scores,
)
from ratchet.serving.bundle import base_hash


def fill(root: Path, table: Retention, newest: Evaluation, config: Config, say: Callable[[str], None]) -> int:
    """Fill the missing cells and return their number.

    A version whose weights cannot be fetched is reported and skipped. Raises CheckoutError when the rows
    cannot be fetched.
    """
    if not (wanted := table.unasked):
        return 0
    filled = 0
    with tempfile.TemporaryDirectory(prefix="ratchet-retention-") as scratch:
        folder = Path(scratch)
        rows = _rows(root, newest, folder)
        for version, slices in wanted:
            asked = [row for row in rows if counted_in(row) in slices]
            try:
                place = folder / version.adapter[:16]
                cells = _ask(root, version, asked, table.metric, config, place) if asked else {}
            except RatchetError as error:
                say(f"{version.name} stays unasked: {str(error).splitlines()[0]}")
                continue
            known = read_filled(root, version.adapter, table.metric)
            path = filled_file(root, version.adapter, table.metric)
            write_json(path, msgspec.to_builtins({**known, **cells}))
            filled += len(cells)
    forget_oldest(root / ANSWERS, config.evaluate.cache_mib)
    return filled


def _rows(root: Path, newest: Evaluation, folder: Path) -> list[Example]:
    """Return the rows that the newest evaluation asked the candidate."""
    require_output(root, newest.commit, "data/prepared", folder / "prepared")
    scores = read_scores(root, newest.commit)
    ids = set(scores.id[scores.model == "candidate"])
    return [
        row
        for name in ("test", "golden")
        for row in read_examples(folder / f"prepared/{name}.jsonl")
        if row.id in ids
    ]


def _ask(
    root: Path, version: VersionRow, asked: list[Example], metric: str, config: Config, folder: Path
) -> dict[str, Cell]:
    """Ask the version's model the rows and return slice → cell.

    Raises RatchetError when the weights or the base cannot be fetched, or are not those of the verdict.
    """
    require_output(root, version.commit, "models/candidate", folder / "candidate")
    if (seen := adapter_sha256(folder / "candidate")) != version.adapter:
        raise CheckoutError(
            f"the weights at {version.commit[:8]} have sha256 {seen[:12]}…, its verdict was on"
            f" {version.adapter[:12]}…"
        )
    base = folder.parent / f"base-{base_hash(root, version.commit)}"
    if not base.exists():
        require_output(root, version.commit, "models/base", base)
    media = MediaStore.read(folder.parent / "prepared" / MEDIA)
    models, rows = Models(), Asked(asked, [counted_in(row) for row in asked], media=media)
    cache = root / ANSWERS if config.evaluate.cache_mib else None
    found = answer(
        Player(version.name, base, folder / "candidate", folder / "candidate"),
        models,
        rows,
        config.evaluate,
        cache,
    )
    scores = add_scores(
        frame_of(asked, version.name, found, config.evaluate, media),
        asked,
        config.evaluate,
        load_custom(config.evaluate.custom, root / "metrics"),
    )
    if metric not in scores:
        raise CheckoutError(
            f"`evaluate.metrics` has no {metric}", remedy="name a metric that is computed with --metric"
        )
    cells = cells_of(scores, metric)
    return {name: msgspec.structs.replace(cell, from_="filled") for name, cell in cells.items()}
