"""Rows that preparation held back with a doubt go to the people's queue; what they accept becomes a batch
that is not doubted again.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from ratchet.config.params import Config
from ratchet.data.batches import check_batch, raw_lines, read_manifest
from ratchet.data.examples import RowError
from ratchet.data.validation import Validator
from ratchet.review.queue import ReviewQueue
from ratchet.review.records import Item
from tasks.prepare import Rejection, origin_of


def queue_doubtful(home: Path, data: Path, rejected: list[Rejection], config: Config) -> int:
    """How many are new in the queue of `home`.

    `data` is the folder `data` of the checkout that holds the batches. Raises DataError: a batch is missing
    or changed.
    """
    doubtful: dict[str, dict[int, Rejection]] = defaultdict(dict)
    for row in rejected:
        if row.review:
            doubtful[row.batch][row.line] = row
    if not doubtful:
        return 0
    validator = Validator(config.prepare)
    queue = ReviewQueue(home)
    try:
        added = 0
        for batch in read_manifest(data / "raw"):
            rows = doubtful.get(batch.name, {})
            items = []
            for number, line in raw_lines(check_batch(data / "raw", batch)) if rows else []:
                if number not in rows:
                    continue
                try:
                    example = validator.check(line, origin_of(batch), doubts=False).example
                except RowError:
                    continue  # the settings changed meanwhile: it is unfit by another reason
                meta = {**example.meta, "row": f"{batch.name}:{number}"}
                items.append(
                    Item(
                        example.id,
                        f"doubts-{Path(batch.name).stem}",
                        "quarantine",
                        example.messages,
                        meta=meta,
                        doubts=(rows[number].message,),
                    )
                )
            added += queue.add(items, share=config.review.share)
        return added
    finally:
        queue.close()
