"""Finds pairs that agree in one of several keys, and joins pairs to groups: what near-duplicates are made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_MOST_NEIGHBOURS = 16


def pairs_with_equal_keys(keys: np.ndarray, most: int = _MOST_NEIGHBOURS) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of places whose keys are equal, in arrays (first, second).

    Every place is paired with at most ``most`` others of its key: of a key that thousands share, a chain of pairs.

    Args:
        keys: uint64 (places,)
        most: See above.
    """
    import numpy as np

    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    left = np.arange(len(keys) - 1)
    for step in range(1, most + 1):
        left = left[left + step < len(keys)]
        left = left[ordered[left] == ordered[left + step]]
        if not len(left):
            return
        yield order[left], order[left + step]


def groups_of(pairs: list[tuple[int, int]]) -> list[list[int]]:
    """Connected groups, largest first; members and equally large groups in rising order."""
    parent: dict[int, int] = {}

    def root(place: int) -> int:
        while parent.setdefault(place, place) != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    for first, second in pairs:
        a, b = root(first), root(second)
        parent[max(a, b)] = min(a, b)
    groups: dict[int, list[int]] = {}
    for place in sorted(parent):
        groups.setdefault(root(place), []).append(place)
    return sorted(groups.values(), key=lambda group: (-len(group), group[0]))
