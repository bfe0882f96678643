"""Pack rows into fixed windows; positions restart with each row, so that rows do not see each other.

No row is cut. Rows are placed longest first into the fullest window that still takes them (best-fit
decreasing, arXiv 2404.10830), and windows keep the order in which they were opened.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from enum import IntEnum
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from ratchet.models.chat_template import Encoded

IGNORED = -100  # the label of tokens that the loss leaves out, as in torch and transformers


class Role(IntEnum):
    """The role of a row in a training on preferences."""

    PLAIN = 0  # learned by cross-entropy
    CHOSEN = 1  # the better answer of a pair
    REJECTED = 2  # the worse one; it follows the better one
    DESIRABLE = 3
    UNDESIRABLE = 4
    MISMATCHED = 5  # the prompt of the (un)desirable row before it, with the answer of another row


FOLLOWS = (Role.REJECTED, Role.MISMATCHED)  # these are computed together with the row before


class Window(NamedTuple):
    """Rows one after another, up to a window's length in tokens; the collator pads.

    `roles` and `references` have one entry a row, and are empty where no preferences are learned. A reference
    is the log-probability of the answer before the training, in nats. `shown` is the number of pictures of
    each row, and is empty where no row shows any. `owners` has a number for the user of each row, and is
    empty where no row names one.
    """

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int]
    roles: Sequence[int] = ()
    references: Sequence[float] = ()
    media: Sequence[str] = ()  # names of the pictures, row by row
    shown: Sequence[int] = ()
    owners: Sequence[int] = ()


TOKEN_COLUMNS = Window._fields[:3]  # one entry a token


class Unit(NamedTuple):
    """Rows that are computed together: one, or two that are compared."""

    rows: list[Encoded]
    roles: list[Role]


def pack(rows: Sequence[Encoded], window: int, owners: Sequence[int] = ()) -> list[Window]:
    """Put every row into exactly one window. Raises ValueError: a row is longer than a window.

    `owners`: a number for the user of each row, or none.
    """
    return _most_first(
        _join([rows[index] for index in members])._replace(
            owners=[owners[index] for index in members] if owners else ()
        )
        for members in best_fit([len(row.ids) for row in rows], window)
    )


def pack_units(units: Sequence[Unit], window: int) -> list[Window]:
    """Put every unit whole into one window; if a unit is longer than `window`, windows are as long as it."""
    sizes = [sum(len(row.ids) for row in unit.rows) for unit in units]
    return _most_first(
        _join([row for index in members for row in units[index].rows])._replace(
            roles=[int(role) for index in members for role in units[index].roles]
        )
        for members in best_fit(sizes, max(window, *sizes, 0))
    )


def _most_first(windows: Iterable[Window]) -> list[Window]:
    """Put those with most pictures first, since a probe of a training takes the first to see its memory."""
    return sorted(windows, key=lambda window: -len(window.media))


def best_fit(sizes: Sequence[int], window: int) -> list[list[int]]:
    """Return, for each window, the indices of its items. Raises ValueError for one larger than a window."""
    longest = max(sizes, default=0)
    if longest > window:
        raise ValueError(f"a row has {longest} tokens, the window holds {window}")
    members: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, window), sorted
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        size = sizes[index]
        place = bisect_left(room, (size, -1))
        free, target = room.pop(place) if place < len(room) else (window, len(members))
        if target == len(members):
            members.append([])
        members[target].append(index)
        insort(room, (free - size, target))
    return members


def _join(rows: Sequence[Encoded]) -> Window:
    ids = [token for row in rows for token in row.ids]
    # The first token of a row is never a target, because no token of its row precedes it.
    labels = [
        token if learned and position else IGNORED
        for row in rows
        for position, (token, learned) in enumerate(zip(row.ids, row.learned, strict=True))
    ]
    positions = [position for row in rows for position in range(len(row.ids))]
    media = [name for row in rows for name in row.media]
    return Window(
        ids, labels, positions, media=media or (), shown=[len(row.media) for row in rows] if media else ()
    )


def rows_of(window: Window) -> list[Window]:
    """Split a window into its rows, each a window by itself: the inverse of `_join`."""
    starts = [index for index, position in enumerate(window.position_ids) if position == 0]
    counts = window.shown or [0] * len(starts)
    return [
        Window(
            window.input_ids[start:end],
            window.labels[start:end],
            window.position_ids[start:end],
            window.roles[place : place + 1],
            media=window.media[last - count : last],
            shown=[count] if count else (),
            owners=window.owners[place : place + 1],
        )
        for place, (start, end, count, last) in enumerate(
            zip(starts, [*starts[1:], len(window.input_ids)], counts, accumulate(counts), strict=True)
        )
    ]


def units_of(rows: Sequence[Window]) -> list[list[Window]]:
    """Split rows into those that are computed together: the inverse of `Unit.rows`."""
    units: list[list[Window]] = []
    for row in rows:
        if row.roles and row.roles[0] in FOLLOWS:
            units[-1].append(row)
        else:
            units.append([row])
    return units


def by_length(units: Sequence[list[Window]], budget: int) -> list[list[Window]]:
    """Put every unit of rows into exactly one group of rows of similar length.

    A group, padded to its longest row, has at most `budget` positions, unless it is a single unit.
    """
    groups: list[list[Window]] = []
    longest = 0  # of the newest group
    for unit in sorted(units, key=lambda unit: -_longest(unit)):
        if groups and (len(groups[-1]) + len(unit)) * longest <= budget:
            groups[-1] += unit
        else:
            groups.append([*unit])
            longest = _longest(unit)
    return groups


def _longest(unit: Sequence[Window]) -> int:
    return max(len(row.input_ids) for row in unit)


def group_rows(windows: Sequence[Window], batch_windows: int) -> list[list[Window]]:
    """Group the windows' rows by length; a padded group has no more positions than a batch of windows."""
    units = [unit for window in windows for unit in units_of(rows_of(window))]
    return by_length(units, batch_windows * max(len(window.input_ids) for window in windows))


def write_windows(path: Path, windows: Sequence[Window]) -> None:
    """Write Arrow's file format: columns of lists, the optional ones only where rows have some."""
    import pyarrow as pa

    optional = ("roles", "media", "shown", "owners")
    more = [name for name in optional if any(getattr(window, name) for window in windows)]
    names = [*TOKEN_COLUMNS, *more]
    schema = pa.schema([(name, pa.list_(pa.string() if name == "media" else pa.int32())) for name in names])
    table = pa.table({name: [getattr(window, name) for window in windows] for name in names}, schema=schema)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(table)


def read_windows(path: Path) -> list[Window]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_file(source).read_all()
    names = table.column_names
    columns = (table[name].to_pylist() for name in names)
    return [Window(**dict(zip(names, row, strict=True))) for row in zip(*columns, strict=True)]
