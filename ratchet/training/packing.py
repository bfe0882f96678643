"""Pack whole rows into fixed windows by best fit; positions restart, so that rows do not see each other.

No row is cut. Rows are placed longest first into the fullest window that still takes them (best-fit
decreasing, arXiv 2404.10830), and windows keep the order in which they were opened.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ratchet.models.chat_template import Encoded

IGNORED = -100  # the label that the loss leaves out, as in torch and transformers


class Window(NamedTuple):
    """Rows side by side, at most a window's length; the collator pads."""

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int]


def pack(rows: Sequence[Encoded], window: int) -> list[Window]:
    """Put every row into exactly one window. Raises ValueError: a row is longer than a window."""
    longest = max((len(row.ids) for row in rows), default=0)
    if longest > window:
        raise ValueError(f"a row has {longest} tokens, the window holds {window}")
    members: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, window), sorted
    for index in sorted(range(len(rows)), key=lambda index: -len(rows[index].ids)):
        size = len(rows[index].ids)
        place = bisect_left(room, (size, -1))
        free, target = room.pop(place) if place < len(room) else (window, len(members))
        if target == len(members):
            members.append([])
        members[target].append(index)
        insort(room, (free - size, target))
    return [_join([rows[index] for index in chosen]) for chosen in members]


def _join(rows: Sequence[Encoded]) -> Window:
    ids = [token for row in rows for token in row.ids]
    # The first token of a row is never a target: nothing of its own row stands before it.
    labels = [
        token if learned and position else IGNORED
        for row in rows
        for position, (token, learned) in enumerate(zip(row.ids, row.learned, strict=True))
    ]
    return Window(ids, labels, [position for row in rows for position in range(len(row.ids))])


def rows_of(window: Window) -> list[Window]:
    """Split a window into its rows, each a window by itself: the inverse of `_join`."""
    starts = [index for index, position in enumerate(window.position_ids) if position == 0]
    return [
        Window(*(column[start:end] for column in window))
        for start, end in zip(starts, [*starts[1:], len(window.input_ids)], strict=True)
    ]


def by_length(rows: Sequence[Window], budget: int) -> list[list[Window]]:
    """Put every row into exactly one group of rows of like length.

    A group padded to its longest row holds `budget` positions at most, or a single row.
    """
    groups: list[list[Window]] = []
    for row in sorted(rows, key=lambda row: -len(row.input_ids)):
        if groups and (len(groups[-1]) + 1) * len(groups[-1][0].input_ids) <= budget:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def group_rows(windows: Sequence[Window], batch_windows: int) -> list[list[Window]]:
    """Group the windows' rows by length; a padded group takes no more room than a batch of windows."""
    rows = [row for window in windows for row in rows_of(window)]
    return by_length(rows, batch_windows * max(len(window.input_ids) for window in windows))


def write_windows(path: Path, windows: Sequence[Window]) -> None:
    """Write Arrow's file format, three columns of integer lists."""
    import pyarrow as pa

    schema = pa.schema([(name, pa.list_(pa.int32())) for name in Window._fields])
    table = pa.table(
        {name: [getattr(window, name) for window in windows] for name in Window._fields}, schema=schema
    )
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(table)


def read_windows(path: Path) -> list[Window]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_file(source).read_all()
    return [Window(*row) for row in zip(*(table[name].to_pylist() for name in Window._fields), strict=True)]
