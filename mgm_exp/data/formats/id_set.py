"""A set of texts that stays small: what tells the second row with an id from the first, in files of any length."""

from __future__ import annotations

import hashlib

import numpy as np

_FIRST_SLOTS = 1 << 12
_MOST_FULL = 0.6
_AT_ONCE = 1 << 16


class IdSet:
    """Texts that were seen, kept as 64-bit hashes in an open-addressing table: 13 to 27 bytes a text of any length.

    A set of Python strings takes about ten times as much. Two texts share a hash with a probability of n^2 / 2^65:
    3e-8 for a million ids in one file, 3e-4 for a hundred million.
    """

    def __init__(self) -> None:
        self._n = 0
        self._table = np.empty(0, np.uint64)
        self._resize(_FIRST_SLOTS)

    def __len__(self) -> int:
        return self._n

    def add(self, text: str) -> bool:
        """Adds a text; False if it was there already."""
        return self.add_hash(hash_text(text))

    def add_hash(self, value: int) -> bool:
        """Adds a text by its :func:`hash_text`; False if it was there already."""
        slots, mask = self._slots, self._mask
        slot = value & mask
        while held := slots[slot]:
            if held == value:
                return False
            slot = (slot + 1) & mask
        slots[slot] = value
        self._n += 1
        if self._n > self._most:
            self._resize(2 * len(self._table))
        return True

    def __contains__(self, text: str) -> bool:
        value = hash_text(text)
        slot = value & self._mask
        while held := self._slots[slot]:
            if held == value:
                return True
            slot = (slot + 1) & self._mask
        return False

    def _resize(self, capacity: int) -> None:
        """Moves everything to a new table of ``capacity`` slots, a power of two."""
        old = self._table
        self._table, self._mask = np.zeros(capacity, np.uint64), capacity - 1
        self._slots = memoryview(self._table.data)  # plain integers in and out, several times faster than numpy's own
        self._most = int(capacity * _MOST_FULL)
        for start in range(0, len(old), _AT_ONCE):
            part = old[start : start + _AT_ONCE]
            self._place(part[part != 0])

    def _place(self, values: np.ndarray) -> None:
        table, mask = self._table, np.uint64(self._mask)
        slots = values & mask
        while len(values):  # in rounds: whoever finds his slot taken tries the next one
            free = table[slots] == 0
            table[slots[free]] = values[free]
            is_waiting = table[slots] != values
            values, slots = values[is_waiting], (slots[is_waiting] + np.uint64(1)) & mask


def hash_text(text: str) -> int:
    """64-bit hash of a text, the same on every machine; never 0."""
    raw = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little") or 1
