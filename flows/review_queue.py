"""Queue rows that preparation rejected with a doubt for review; accepted rows are not doubted again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import msgspec

from flows.data_check import read_rejected
from ratchet.config.params import Config
from ratchet.data.batches import Batch, check_batch, raw_lines, read_manifest
from ratchet.data.examples import RowError, prompt_key, read_examples
from ratchet.data.profile import SPLITS
from ratchet.data.validation import Doubt, Validator
from ratchet.errors import UserError
from ratchet.pipeline.checkout import Say
from ratchet.pipeline.dvc import bring, configured_remote
from ratchet.pipeline.workspace import open_workspace
from ratchet.review.queue import ReviewQueue
from ratchet.review.records import Item
from tasks.prepare import Rejection, origin_of

PREPARED = Path("data/prepared")


def queue_doubtful(home: Path, data: Path, rejected: list[Rejection], config: Config) -> int:
    """Put the doubtful rows into the queue of `home`, and return how many of them are new there.

    `data` is the folder `data` of the checkout with the batches. Raises DataError when a batch is missing or
    changed.
    """
    doubtful: dict[str, dict[int, Rejection]] = defaultdict(dict)
    for row in rejected:
        if row.review:
            doubtful[row.batch][row.line] = row
    if not doubtful:
        return 0
    validator, queue = Validator(config.prepare), ReviewQueue(home)
    try:
        found = [
            (item, prompt)
            for batch in read_manifest(data / "raw")
            for item, prompt in _read_items(data / "raw", batch, doubtful.get(batch.name, {}), validator)
            if queue.get(item.draft, item.id) is None
        ]
        earlier = _first_answers(data / "prepared", {prompt for _, prompt in found if prompt is not None})
        items = [
            msgspec.structs.replace(item, earlier=earlier.get(prompt, "")) if prompt is not None else item
            for item, prompt in found
        ]
        return queue.add(items, share=config.review.share)
    finally:
        queue.close()


def collect_doubtful(home: Path, config: Config, say: Say) -> int:
    """Queue the doubtful rows of the newest committed preparation, and return how many are new here.

    The machine that prepared may be gone, such as a runner; its rows and what it rejected are in DVC. Raises
    UserError: no preparation is committed; CheckoutError: the rows are not here.
    """
    with open_workspace(home, "review", say, keep_failed=0) as workspace:
        bring(workspace, "data/raw")
        rejected = workspace.path / PREPARED / "rejected.jsonl"
        if (workspace.path / "dvc.lock").exists():
            command = "pull" if configured_remote(home) else "checkout"
            workspace.dvc(command, "--quiet", "--allow-missing", str(PREPARED))
        if not rejected.exists():
            raise UserError(
                "what the last preparation rejected is not here",
                remedy="git pull brings its commit, a DVC remote what the other machine pushed",
            )
        return queue_doubtful(home, workspace.path / "data", read_rejected(rejected), config)


def _first_answers(prepared: Path, prompts: set[int]) -> dict[int, str]:
    """Return the first accepted answer to each prompt, by `prompt_key`."""
    found: dict[int, str] = {}
    for split in SPLITS if prompts else ():
        for example in read_examples(prepared / f"{split}.jsonl"):
            if (prompt := prompt_key(example)) in prompts:
                found.setdefault(prompt, example.answer)
    return found


def _read_items(
    raw: Path, batch: Batch, rows: dict[int, Rejection], validator: Validator
) -> Iterator[tuple[Item, int | None]]:
    """Read the doubtful rows from their batches as they would be learned; rejected.jsonl has no texts.

    With a row that contradicts an earlier one comes the key of their prompt.
    """
    if not rows:
        return
    for number, line in raw_lines(check_batch(raw, batch)):
        if number not in rows:
            continue
        try:
            example = validator.check(line, origin_of(batch)).example  # the doubt was about other rows
        except Doubt as doubt:
            example = doubt.example
        except RowError:
            continue  # with today's settings the row is rejected for another reason
        meta = {**example.meta, "row": f"{batch.name}:{number}"}
        draft, doubts = f"doubts-{Path(batch.name).stem}", (rows[number].message,)
        item = Item(example.id, draft, "quarantine", example.messages, meta=meta, doubts=doubts)
        yield item, prompt_key(example) if rows[number].reason == "contradiction" else None
