"""64-bit keys with small values, compact: 12 bytes a slot where a dict of ints takes over 100, so that ten million rows fit."""

from __future__ import annotations

from array import array

FULL = 0.7


class Seen:
    """Open addressing with linear probing; a key of 0 is kept as 1. Two keys of 64 bits that are alike by chance: one in 400,000 over ten million."""

    def __init__(self) -> None:
        self._size, self._count = 1 << 12, 0
        self._keys, self._values = array("Q", bytes(8 * self._size)), array("I", bytes(4 * self._size))

    def __len__(self) -> int:
        return self._count

    def put(self, key: int, value: int = 0) -> int | None:
        """The value that stands there already, which stays; None when the key is new."""
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
