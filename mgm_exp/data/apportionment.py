"""Which rows go into which part of a split: exact shares in every stratum, groups kept together, no chance involved.

    parts = apportion(groups, strata, shares=(0.8, 0.1, 0.1), seed=0)       # a part for each row

The result depends on the set of rows, not on their order. Within a stratum groups are taken by size, the largest first,
and among equals by a hash of group and seed; each goes to the part that is least full among those with room for it. So
every part gets its share of large and of small groups, the small ones close the gaps, and a stratum of single rows is
divided exactly, but for what is less than one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt


def apportion(
    groups: npt.NDArray[np.uint64], strata: npt.NDArray[np.int64], shares: Sequence[float], seed: int
) -> npt.NDArray[np.int8]:
    """The part of each row.

    Args:
        groups: For each row a number that it shares with the rows that must be in the same part.
        strata: For each row the number of its stratum, from 0; their order breaks ties.
        shares: Of the parts; they sum to 1, and a part with the share 0 gets no row.
        seed: Another one gives another division.
    """
    names, of_row, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    of_row = of_row.reshape(-1)
    stratum = _strata_of_groups(of_row, strata)
    order = np.lexsort((_mixed(names, seed), -sizes, stratum))
    parts = np.zeros(len(names), np.int8)
    wanted, given = np.zeros(len(shares)), np.zeros(len(shares), np.int64)
    bounds = [*np.flatnonzero(np.diff(stratum[order], prepend=-1)), len(order)]
    for start, end in pairwise(bounds):
        members = order[start:end]
        n_rows = int(sizes[members].sum())
        wanted += n_rows * np.asarray(shares)
        lacking = _whole_shares(n_rows, shares, wanted - given)
        chosen = _fill(sizes[members].tolist(), lacking, shares)
        parts[members] = chosen
        given += np.bincount(chosen, weights=sizes[members], minlength=len(shares)).astype(np.int64)
    return parts[of_row]


def _strata_of_groups(of_row: npt.NDArray[np.intp], strata: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """For each group the stratum that most of its rows are in; of equals the first."""
    n_strata = int(strata.max(initial=0)) + 1
    pairs, counts = np.unique(of_row.astype(np.int64) * n_strata + strata, return_counts=True)
    group, stratum = pairs // n_strata, pairs % n_strata
    order = np.lexsort((stratum, -counts, group))
    first = np.flatnonzero(np.diff(group[order], prepend=-1))
    return stratum[order][first]


def _whole_shares(n_rows: int, shares: Sequence[float], lacking: npt.NDArray[np.float64]) -> list[int]:
    """How many of ``n_rows`` each part should get: rounded down, and the rest to those that lack most in all."""
    exact = [n_rows * share for share in shares]
    whole = [int(value + 1e-9) for value in exact]
    after = [lacking[part] - whole[part] for part in range(len(shares))]
    rounded = [part for part in range(len(shares)) if exact[part] - whole[part] > 1e-9]
    rounded.sort(key=lambda part: (-after[part], part))
    for part in rounded[: n_rows - sum(whole)]:
        whole[part] += 1
    return whole


def _fill(sizes: list[int], wanted: list[int], shares: Sequence[float]) -> npt.NDArray[np.int8]:
    """The part of each group, the groups taken in turn.

    Of the parts that a group fits into, it goes to the one that is least full for its size. If it went to the one that
    lacks most rows, all large groups would be in the largest part, and the parts would not be alike.
    """
    parts = [part for part in range(len(shares)) if shares[part] > 0]
    lacking = list(wanted)
    chosen = np.empty(len(sizes), np.int8)
    for number, size in enumerate(sizes):
        best, least_full = -1, 0.0
        for part in parts:
            if size <= lacking[part] and lacking[part] > least_full * wanted[part]:
                best, least_full = part, lacking[part] / wanted[part]
        if best < 0:
            best = max(parts, key=lacking.__getitem__)
        lacking[best] -= size
        chosen[number] = best
    return chosen


def _mixed(values: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.uint64]:
    """A bijective hash of 64-bit numbers (the finaliser of SplitMix64), another one for each seed."""
    with np.errstate(over="ignore"):
        mixed = values + np.uint64((seed * 0x9E3779B97F4A7C15) & (2**64 - 1)) + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))
