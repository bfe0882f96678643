"""Find near duplicates, assign splits that stay the same while the data grow, and recognise known rows.

Rows come in the order of their batches. The id (a hash) of the first row of a cluster of near duplicates
decides the cluster's split; later rows follow it. A row near to clusters of different splits would leak
between them, so it is rejected (`straddles`). MinHash LSH (rensa) over shingles of three words finds the
candidates; the exact Jaccard similarity decides.

Of rows with pictures, the pictures decide first: rows that share one stand in one split, and their texts are
near only where their pictures are the same files. Two pictures count as one if the files are the same, or if
their difference hashes differ in at most `prepare.picture_distance` bits and their grey cells are alike; two
recordings, if their samples are the same.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Generic, Literal, NamedTuple, TypeVar, cast

import numpy as np
from rensa import RMinHash, RMinHashLSH

from ratchet.config.data import PrepareConfig
from ratchet.data.examples import CONTINUE, MEDIA_MARK, Example
from ratchet.media.pictures import Look, alike

Split = Literal["train", "validation", "test"]
Side = Literal["train", "validation", "test", "golden"]

PERMUTATIONS = 128  # hash functions of a MinHash sketch
MISSED = 1e-3  # share of the pairs at the threshold that LSH may miss, at most
RUN = 13  # consecutive words shared with a golden row that make a leak (Brown et al. 2020, appendix C)
# A Chinese or Japanese character is a word; marks belong to their letter (Hindi's vowel signs are not in \w);
# other signs are words too, so that C, C++ and C# differ.
CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
MARKS = r"\u0300-\u036f\u064b-\u065f\u0900-\u0903\u093a-\u094f\u0962\u0963\u200c\u200d"
TOKEN = re.compile(rf"[{CJK}]|(?:[^\W{CJK}][{MARKS}]*)+|[^\w\s,.;:!?'\"]")
FULL = 0.7  # share of used slots above which a hash table doubles its size


class Placed(NamedTuple):
    """The side of a row.

    `near` is the id of the row that it is near to, if any; `crowd` counts the rows of its cluster so far.
    """

    side: Side | Literal["straddles"]
    near: str | None
    crowd: int = 1


class Clusters:
    """The clusters of near duplicates among the rows placed so far, each with its side."""

    def __init__(self, config: PrepareConfig, known: PlacedRows[Any] | None = None) -> None:
        self._config = config
        self.gallery = Gallery(config.picture_distance)
        self._known: PlacedRows[Any] = known or NearRows(config)
        self._cluster: list[int] = []  # a row's cluster, by the place of the cluster's first row
        self._crowds: Counter[int] = Counter()

    def place(
        self,
        example: Example,
        side: Side | None = None,
        *,
        counts: bool = True,
        wanted: Split | None = None,
    ) -> Placed:
        """Choose the row's side; `side` fixes it (golden rows).

        A rejected row (near a golden row, or `straddles`) is not remembered. If `counts` is false, the row
        still decides the side of later rows, but does not add to its cluster's `crowd`. `wanted` is the only
        split that the row may stand in: near to a row of another one, it straddles.
        """
        groups = self.gallery.groups(example.media)
        signed, rows = self._known.sign(example), self._known.rows
        close = self._known.close(signed)
        near = [place for place, alike in close if alike >= self._config.near_duplicate]
        golden = next((rows[place][0] for place, _ in close if rows[place][1] == "golden"), None)
        if side is None and golden:
            return Placed("golden", golden)
        shared = self.gallery.sides(groups)
        if side is None and (found := next((id for id, at in shared if at == "golden"), None)):
            return Placed("golden", found)
        if side is None and self._known.quotes_golden(example):
            return Placed("golden", None)
        if wanted:
            followed: Side = wanted
        elif shared:
            followed = shared[0][1]
        else:
            followed = cast(Side, rows[near[0]][1]) if near else split_by_hash(example.id, self._config)
        chosen: Side = side or followed
        stranger = next((rows[place][0] for place, _ in close if rows[place][1] != chosen), None) or next(
            (id for id, at in shared if at != chosen), None
        )
        if side is None and stranger:
            return Placed("straddles", stranger)
        self.gallery.hang(groups, example.id, chosen)
        place = self._known.add(example, chosen, signed)
        cluster = self._cluster[near[0]] if near else place
        self._cluster.append(cluster)
        self._crowds[cluster] += counts
        return Placed(chosen, rows[near[0]][0] if near else None, self._crowds[cluster])

    def place_by_pictures(self, example: Example, own: str, wanted: Split | None = None) -> Placed:
        """Choose the row's side by its pictures alone; those of new pictures, by the hash `own`.

        `wanted`: as for `place`.
        """
        groups = self.gallery.groups(example.media)
        shared = self.gallery.sides(groups)
        if found := next((id for id, at in shared if at == "golden"), None):
            return Placed("golden", found)
        chosen: Side = wanted or (shared[0][1] if shared else split_by_hash(own, self._config))
        if stranger := next((id for id, at in shared if at != chosen), None):
            return Placed("straddles", stranger)
        self.gallery.hang(groups, example.id, chosen)
        return Placed(chosen, None)


class Gallery:
    """The pictures and recordings of the rows so far, in groups of those that count as the same, each with
    its side.
    """

    def __init__(self, distance: int) -> None:
        self._distance = distance
        self._looks: dict[str, Look | None] = {}
        self._heard: dict[bytes, int] = {}  # hash of a recording's samples → group
        self._samples: dict[str, bytes] = {}
        self._group: dict[str, int] = {}
        self._parents: list[int] = []
        self._shown = LookIndex(distance)
        self._sides: dict[int, list[tuple[str, Side]]] = {}  # group → its sides, each with its first row

    def learn(self, name: str, look: Look | None) -> None:
        """Remember what a picture shows; None: it shows too little to be compared."""
        self._looks[name] = look

    def hear(self, name: str, samples: bytes) -> None:
        """Remember a recording by the hash of its samples."""
        self._looks[name], self._samples[name] = None, samples

    def knows(self, name: str) -> bool:
        return name in self._looks

    def groups(self, names: Iterable[str]) -> tuple[int, ...]:
        """Return the groups of pictures, in their order."""
        places = [self._find(name) for name in names]  # each may join groups, also those found before it
        return tuple(self._root(place) for place in places)

    def sides(self, groups: Iterable[int]) -> list[tuple[str, Side]]:
        """Return the sides on which the pictures stand already, each with the id of a row."""
        return [side for group in dict.fromkeys(groups) for side in self._sides.get(group, ())]

    def hang(self, groups: Iterable[int], id: str, side: Side) -> None:
        """Remember on which side the pictures stand."""
        for group in groups:
            known = self._sides.setdefault(group, [])
            if all(at != side for _, at in known):
                known.append((id, side))

    def _find(self, name: str) -> int:
        if name not in self._group:
            self._group[name] = self._place(name)
        return self._root(self._group[name])

    def _root(self, group: int) -> int:
        while self._parents[group] != group:
            group = self._parents[group]
        return group

    def _place(self, name: str) -> int:
        """Put a new picture into the group of those like it, which joins groups, or into one of its own."""
        group = len(self._parents)
        if (samples := self._samples.get(name)) and (same := self._heard.setdefault(samples, group)) < group:
            return same
        self._parents.append(group)
        look = self._looks.get(name)
        if look is None or self._distance < 0:
            return group
        self._looks[name] = None  # the index keeps it
        like = {self._root(other) for other in self._shown.like(look)}
        self._shown.add(look, group)
        first = min(like, default=group)
        for other in sorted(like - {first} | {group} - {first}):
            self._parents[other] = first
            for id, side in self._sides.pop(other, []):
                self.hang([first], id, side)
        return group


class LookIndex:
    """What pictures show, each with its group, searchable by what is alike; about 1 kB of memory a picture.

    Thousands of pages of one form have nearly the same hash, so candidates are compared together, and all of
    their cells only where every FEW-th one agrees.
    """

    FEW = 32

    def __init__(self, distance: int) -> None:
        self._distance = distance
        self._hashes, self._groups = array("Q"), array("q")
        self._cells, self._few = bytearray(), bytearray()
        # Two hashes that differ in at most n bits are equal in at least one of n + 1 parts.
        self._parts: dict[tuple[int, int], array[int]] = {}  # (part, bits) → places in the arrays

    def add(self, look: Look, group: int) -> None:
        for part in _parts_of(look.hash, self._distance + 1):
            self._parts.setdefault(part, array("q")).append(len(self._hashes))
        self._hashes.append(look.hash)
        self._groups.append(group)
        self._cells += look.cells
        self._few += look.cells[:: self.FEW]

    def like(self, look: Look) -> list[int]:
        """Return the groups of the pictures that show the same."""
        parts = (self._parts.get(part) for part in _parts_of(look.hash, self._distance + 1))
        near = [np.frombuffer(places, np.int64) for places in parts if places]
        if not near:
            return []
        places = np.concatenate(near)
        del near  # an array that is looked at cannot grow
        apart = np.bitwise_count(np.frombuffer(self._hashes, np.uint64)[places] ^ np.uint64(look.hash))
        places = np.unique(places[apart <= self._distance])
        for held, cells in ((self._few, look.cells[:: self.FEW]), (self._cells, look.cells)):
            table = np.frombuffer(held, np.uint8).reshape(-1, len(cells))
            places = places[alike(table[places], cells)]
        return [self._groups[place] for place in places]


def _parts_of(hash: int, count: int) -> Iterator[tuple[int, int]]:
    """Cut 64 bits into `count` parts; yield the number and the bits of each."""
    for number in range(count):
        start, end = 64 * number // count, 64 * (number + 1) // count
        yield number, hash >> start & (1 << end - start) - 1


def of_pictures(shingles: frozenset[str], names: tuple[str, ...]) -> frozenset[str]:
    """Mark the shingles of a row with its pictures, so that they equal only those of the same pictures."""
    if not names:
        return shingles
    mark = " ".join(names)
    return frozenset(f"{mark}\n{shingle}" for shingle in shingles)


Signed = TypeVar("Signed")


class PlacedRows(Generic[Signed]):
    """Rows with known sides, in the order of arrival; a subclass finds those that are near to another.

    `Signed` is what a search knows a row by.
    """

    def __init__(self) -> None:
        self.rows: list[tuple[str, str]] = []  # id and side
        self._runs: Counter[int] = Counter()  # hash of RUN words → golden rows that contain them

    def sign(self, example: Example) -> Signed:
        """Return what the row is searched by."""
        raise NotImplementedError

    def close(self, signed: Signed) -> list[tuple[int, float]]:
        """Return (place in `rows`, similarity) of each near row, the oldest first.

        Of near rows with the same shingles and side, only the oldest need be among them.
        """
        raise NotImplementedError

    def add(self, example: Example, side: str, signed: Signed) -> int:
        """Remember a row, and return its place in `rows`."""
        self.rows.append((example.id, side))
        if side == "golden" and not example.media:  # a question about one picture is asked about others too
            self._runs.update(word_runs(example))
        return len(self.rows) - 1

    def quotes_golden(self, example: Example) -> bool:
        """Tell whether the example shares RUN consecutive words with exactly one golden row.

        Words that several golden rows share are a common way to ask, not a quotation.
        """
        return bool(self._runs) and any(self._runs[run] == 1 for run in word_runs(example))


class NearRows(PlacedRows[tuple[frozenset[str], RMinHash]]):
    """Placed rows, searchable by similarity from `leak` on; about 1 kB of memory a row."""

    def __init__(self, config: PrepareConfig) -> None:
        super().__init__()
        self._leak = least_alike(config)
        self._index = RMinHashLSH(
            threshold=self._leak, num_perm=PERMUTATIONS, num_bands=bands_for(self._leak)
        )
        self._shingles: list[frozenset[str]] = []

    def sign(self, example: Example) -> tuple[frozenset[str], RMinHash]:
        shingles = shingles_of(example)
        return shingles, sketch_of(shingles)

    def close(self, signed: tuple[frozenset[str], RMinHash]) -> list[tuple[int, float]]:
        shingles, sketch = signed
        places = sorted(self._index.query(sketch))
        found = [(place, jaccard(shingles, self._shingles[place])) for place in places]
        return [(place, alike) for place, alike in found if alike >= self._leak]

    def add(self, example: Example, side: str, signed: tuple[frozenset[str], RMinHash]) -> int:
        place = super().add(example, side, signed)
        self._index.insert(place, signed[1])
        self._shingles.append(signed[0])
        return place


def least_alike(config: PrepareConfig) -> float:
    """Return the least similarity at which two rows have to be compared."""
    return min(config.leak, config.near_duplicate)


def shingles_of(example: Example) -> frozenset[str]:
    """Return the shingles by which a row is near to others: of its words and its pictures."""
    return of_pictures(shingle(example), example.media)


def sketch_of(shingles: frozenset[str]) -> RMinHash:
    sketch = RMinHash(num_perm=PERMUTATIONS, seed=42)
    sketch.update(sorted(shingles))
    return sketch


def bands_for(threshold: float) -> int:
    """Return the fewest bands, since they give the fewest candidates, that miss few pairs at the threshold.

    At similarity 0.7, 32 bands of 4 hashes miss a share of (1 - 0.7^4)^32 of the pairs, one in 6,500.
    """
    return next(
        (bands for bands in (4, 8, 16, 32) if (1 - threshold ** (PERMUTATIONS // bands)) ** bands < MISSED),
        PERMUTATIONS,
    )


def split_by_hash(example_id: str, config: PrepareConfig) -> Split:
    """Choose the split by the id alone, so that no earlier row has to be known."""
    position = int(example_id[:13], 16) / 16**13  # 52 bits, as a float holds them exactly
    if position < config.test_share:
        return "test"
    return "validation" if position < config.test_share + config.validation_share else "train"


def shingle(example: Example) -> frozenset[str]:
    """Cut the user's messages (of plain text, the text) into word trigrams; a shorter text is one shingle.

    Answers are left out, because the same question must not be asked in training and in test.
    """
    asked = _asked(example)
    text = (asked if asked != CONTINUE else example.answer).lower()
    words = TOKEN.findall(text) or [text]
    if len(words) < 3:
        return frozenset([" ".join(words)])
    return frozenset(" ".join(words[start : start + 3]) for start in range(len(words) - 2))


def word_runs(example: Example) -> set[int]:
    """Hash every RUN consecutive words of the user's messages, to find a quotation within any other text."""
    words = TOKEN.findall(_asked(example).lower())
    return {hash(tuple(words[start : start + RUN])) for start in range(len(words) - RUN + 1)}


def _asked(example: Example) -> str:
    asked = " ".join(message.content for message in example.prompt if message.role == "user")
    return asked.replace(MEDIA_MARK, " ") if example.media else asked


def jaccard(left: frozenset[str], right: frozenset[str]) -> float:
    return len(left & right) / (len(left | right) or 1)


class HashTable:
    """A table of 64-bit keys and 32-bit values that takes 12 bytes a slot, where a dict takes about 100.

    Open addressing with linear probing; 0 marks a free slot, so the key 0 is stored as 1. Among ten million
    rows, the chance that any two keys are equal is one in 370,000.
    """

    def __init__(self) -> None:
        self._size, self._count = 1 << 12, 0
        self._keys, self._values = array("Q", bytes(8 * self._size)), array("I", bytes(4 * self._size))

    def __len__(self) -> int:
        return self._count

    def put(self, key: int, value: int = 0) -> int | None:
        """Add a new key and return None; of a known key, keep and return the old value."""
        key = key or 1
        slot = self._find(key)
        if self._keys[slot]:
            return self._values[slot]
        self._keys[slot], self._values[slot] = key, value
        self._count += 1
        if self._count > FULL * self._size:
            self._grow()
        return None

    def get(self, key: int) -> int | None:
        slot = self._find(key or 1)
        return self._values[slot] if self._keys[slot] else None

    def __contains__(self, key: int) -> bool:
        return self._keys[self._find(key or 1)] != 0

    def _find(self, key: int) -> int:
        keys, last = self._keys, self._size - 1
        slot = key & last
        while keys[slot] and keys[slot] != key:
            slot = (slot + 1) & last
        return slot

    def _grow(self) -> None:
        keys, values = self._keys, self._values
        self._size *= 2
        self._keys, self._values = array("Q", bytes(8 * self._size)), array("I", bytes(4 * self._size))
        for key, value in zip(keys, values, strict=True):
            if key:
                slot = self._find(key)
                self._keys[slot], self._values[slot] = key, value
