"""Captions that say nearly the same: MinHash finds candidates, the exact Jaccard index decides.

A caption's features are its words and pairs of neighbouring words, in lower case. Two captions are near-duplicates if
at least 70 % of the features of either occur in both. 60 minima in 15 bands of 4 find such a pair with a probability of
98 % at the threshold and above 99.9 % from 80 % on; what is found is then checked exactly. (Broder 1997; banding as in
Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, 3.4.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mgm_exp.data.exploration.grouping import groups_of, pairs_with_equal_keys
from mgm_exp.data.exploration.tokens import TokenStream

if TYPE_CHECKING:
    import numpy as np

THRESHOLD = 0.7
BANDS, ROWS = 15, 4
_CHUNK = 8192
_PAIR_BITS = 16
_PAIRS = 1 << _PAIR_BITS
_MIX = 0x9E3779B97F4A7C15


def near_duplicate_groups(stream: TokenStream, places: np.ndarray, *, threshold: float = THRESHOLD) -> list[list[int]]:
    """Groups of captions that say nearly the same, largest first.

    Args:
        stream: The words, in lower case.
        places: Captions to look at, each different from the others: places in ``stream``.
        threshold: Smallest Jaccard index of two captions that are joined.

    Returns:
        Members are places in ``stream``.
    """
    import numpy as np

    features = _Features(stream, places)
    if len(places) < 2:
        return []
    signatures = features.minima()
    # One byte of each minimum, a caption's side by side, is enough to estimate how many agree.
    glimpses = np.ascontiguousarray((signatures & 0xFF).astype(np.uint8).T)
    checked = np.zeros(0, dtype=np.uint64)
    found: list[tuple[int, int]] = []
    for band in range(BANDS):
        key = np.zeros(len(places), dtype=np.uint64)
        for row in range(band * ROWS, (band + 1) * ROWS):
            key = (key ^ signatures[row]) * np.uint64(_MIX)
            key ^= key >> np.uint64(29)
        candidates = [checked]
        for first, second in pairs_with_equal_keys(key):
            low, high = np.minimum(first, second), np.maximum(first, second)
            agreement = np.count_nonzero(glimpses[low] == glimpses[high], axis=1)
            is_likely = agreement >= (threshold - 0.18) * BANDS * ROWS  # three standard deviations below
            candidates.append(low[is_likely].astype(np.uint64) << np.uint64(32) | high[is_likely].astype(np.uint64))
        joined = _distinct(np.concatenate(candidates))
        # Of two sorted lists of which one holds the other, what is new has no equal at its place in the shorter one.
        place = np.minimum(np.searchsorted(checked, joined), max(len(checked) - 1, 0))
        new = joined[checked[place] != joined] if len(checked) else joined
        checked = joined
        low, high = (new >> np.uint64(32)).astype(np.int64), (new & np.uint64(0xFFFFFFFF)).astype(np.int64)
        is_near = features.jaccard(low, high) >= threshold
        found += zip(low[is_near].tolist(), high[is_near].tolist(), strict=True)
    return [[int(places[member]) for member in group] for group in groups_of(found)]


class _Features:
    """The sets of features of captions, each as sorted distinct 64-bit hashes.

    Args:
        stream: The words.
        places: Which captions.
    """

    def __init__(self, stream: TokenStream, places: np.ndarray) -> None:
        import numpy as np

        ids = stream.take(places).astype(np.uint64) + np.uint64(1)
        counts = stream.counts[places]
        row_of = np.repeat(np.arange(len(places)), counts)
        is_pair = row_of[1:] == row_of[:-1]
        pairs = (ids[:-1] << np.uint64(32) | ids[1:])[is_pair]
        rows = np.concatenate([row_of, row_of[1:][is_pair]])
        # The caption above, as much of the hash as there is room for below: one sort brings equal features together.
        shift = np.uint64(max(1, len(places).bit_length()))
        keys = _distinct(
            _mixed(np.concatenate([ids, pairs])) >> shift | rows.astype(np.uint64) << np.uint64(64) - shift
        )
        self.hashes = keys & (np.uint64(1) << np.uint64(64) - shift) - np.uint64(1)
        self.counts = np.bincount((keys >> np.uint64(64) - shift).astype(np.int64), minlength=len(places))
        self.hash_bits = 64 - int(shift)
        self.starts = np.cumsum(self.counts) - self.counts

    def minima(self) -> np.ndarray:
        """MinHash signatures: uint32 (BANDS * ROWS, captions)."""
        import numpy as np

        generator = np.random.default_rng(0)
        factors = generator.integers(1 << 62, 1 << 63, BANDS * ROWS, dtype=np.uint64) | np.uint64(1)
        found = np.full((BANDS * ROWS, len(self.counts)), np.iinfo(np.uint32).max, dtype=np.uint32)
        filled = np.flatnonzero(self.counts)
        for start in range(0, len(filled), _CHUNK):
            rows = filled[start : start + _CHUNK]
            first = self.starts[rows[0]]
            hashes = self.hashes[first : self.starts[rows[-1]] + self.counts[rows[-1]]]
            for place, factor in enumerate(factors):
                values = (hashes * factor >> np.uint64(32)).astype(np.uint32)  # the upper half is well mixed
                found[place, rows] = np.minimum.reduceat(values, self.starts[rows] - first)
        return found

    def jaccard(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Common features / all features of pairs of captions: float64 (pairs,)."""
        import numpy as np

        found = np.zeros(len(first))
        cut = np.uint64(max(0, self.hash_bits + _PAIR_BITS - 64))
        for start in range(0, len(first), _PAIRS):
            a, b = first[start : start + _PAIRS], second[start : start + _PAIRS]
            numbers = np.arange(len(a), dtype=np.uint64) << np.uint64(64 - _PAIR_BITS)
            # The pair above, the hash below, as before.
            keys = np.concatenate([self._of(side) >> cut | np.repeat(numbers, self.counts[side]) for side in (a, b)])
            keys.sort()
            common = np.bincount(
                (keys[1:][keys[1:] == keys[:-1]] >> np.uint64(64 - _PAIR_BITS)).astype(np.int64), minlength=len(a)
            )
            found[start : start + _PAIRS] = common / np.maximum(self.counts[a] + self.counts[b] - common, 1)
        return found

    def _of(self, captions: np.ndarray) -> np.ndarray:
        import numpy as np

        counts = self.counts[captions]
        offsets = np.repeat(self.starts[captions] - (np.cumsum(counts) - counts), counts)
        return self.hashes[offsets + np.arange(int(counts.sum()))]


def _distinct(values: np.ndarray) -> np.ndarray:
    """Sorted, each once (np.unique of NumPy 2.4 takes ten times as long for integers)."""
    import numpy as np

    values = np.sort(values)
    return values[np.concatenate([[True], values[1:] != values[:-1]])[: len(values)]]


def _mixed(values: np.ndarray) -> np.ndarray:
    """Spreads the bits of uint64 values (the finaliser of SplitMix64)."""
    import numpy as np

    values = values * np.uint64(_MIX)
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
