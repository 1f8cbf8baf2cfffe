"""How varied the words of captions are, in measures that can be compared between datasets of different sizes.

The type-token ratio (TTR, distinct words / words) falls as a text grows, whatever its variety: of the same captions a
tenth has a far higher TTR than the whole. So the TTR of a whole dataset compares nothing. What is measured here:

- ``moving_average_ttr``: the mean TTR of all windows of 50 words (MATTR-50; Covington and McFall 2010): the size of the
  dataset has no influence. Its interval is a bootstrap over blocks of windows.
- ``ttr_at``: the TTR of so many words, drawn caption by caption *without* replacement. A bootstrap with replacement
  would draw captions twice, find their words again and report too low a value (0.26 in place of 0.36 at 1,000
  captions of web data), with an interval that misses the estimate.
- ``distinct``: distinct n-grams / n-grams of the whole (Li et al. 2016). It depends on size and is to be read with it.
- ``vocabulary_growth``: distinct words against words, mean of several random orders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from mgm_exp.data.exploration.tokens import TokenStream

if TYPE_CHECKING:
    import numpy as np

WINDOW = 50
TTR_SIZES = (1_000, 5_000, 10_000, 50_000, 100_000, 500_000, 1_000_000)
_BLOCK = 500  # windows of a bootstrap block: ten times the length over which neighbouring windows share words
_FULLEST = 0.9  # share of the words above which subsamples overlap too much to tell their spread


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval.

    Args:
        value: The estimate; None: there is too little text.
        ci_low, ci_high: The interval.
    """

    value: float | None
    ci_low: float | None
    ci_high: float | None

    def to_json(self) -> dict[str, float | None]:
        return asdict(self)


def moving_average_ttr(stream: TokenStream, *, window: int = WINDOW, draws: int = 500, seed: int = 0) -> Estimate:
    """The mean TTR of all windows of ``window`` words, over the captions in their order (MATTR).

    Of a text shorter than a window, its TTR. The interval is that of a block bootstrap: neighbouring windows share
    words, so blocks of them are drawn.
    """
    if not len(stream):
        return Estimate(None, None, None)
    if len(stream) < window:
        return Estimate(len(stream.vocabulary) / len(stream), None, None)
    types = window_types(stream.ids, window)
    value = float(types.mean()) / window
    return Estimate(value, *_block_interval(types / window, value, draws, seed))


def window_types(ids: np.ndarray, window: int) -> np.ndarray:
    """Distinct words of each window of ``window`` neighbouring words: int64 (words - window + 1,).

    Word i is the first of its kind in the windows that begin after its last occurrence before, so it counts in a run
    of windows; the runs of all words are summed up by their ends.
    """
    import numpy as np

    total = len(ids)
    windows = total - window + 1
    order = np.argsort(ids, kind="stable")
    is_again = np.concatenate([[False], ids[order][1:] == ids[order][:-1]])
    previous = np.full(total, -1, dtype=np.int64)
    previous[order[is_again]] = order[np.flatnonzero(is_again) - 1]
    place = np.arange(total)
    first = np.maximum(previous + 1, place - window + 1)
    last = np.minimum(place, windows - 1)
    is_counted = first <= last
    change = np.bincount(first[is_counted], minlength=windows + 1)[: windows + 1]
    change -= np.bincount(last[is_counted] + 1, minlength=windows + 1)[: windows + 1]
    return np.cumsum(change)[:windows]


def _block_interval(values: np.ndarray, mean: float, draws: int, seed: int) -> tuple[float | None, float | None]:
    import numpy as np

    blocks = len(values) // _BLOCK
    if blocks < 5:  # an interval from fewer would be a guess
        return None, None
    usable = values[: blocks * _BLOCK].reshape(blocks, _BLOCK).mean(axis=1)
    generator = np.random.default_rng(seed)
    drawn = np.array([usable[generator.integers(0, blocks, blocks)].mean() for _ in range(draws)])
    low, high = np.quantile(drawn, [0.025, 0.975]) - usable.mean() + mean
    return float(low), float(high)


def ttr_at(stream: TokenStream, words: int, *, draws: int = 100, seed: int = 0) -> Estimate:
    """The TTR of ``words`` words: mean of ``draws`` subsamples of whole captions, drawn without replacement.

    The interval tells how far such a value would move with other captions from the same source. Subsamples of one
    dataset overlap and so vary less than that: their spread is divided by sqrt(1 - share of the words drawn), the
    correction for a finite population. It is approximate where the subsample is nearly everything.

    Raises:
        ValueError: the captions have fewer words.
    """
    import numpy as np

    if not 0 < words <= len(stream):
        raise ValueError(f"TTR at {words:,} words was asked for; these captions have {len(stream):,}")
    generator = np.random.default_rng([seed, words])
    ratios = np.array([_types_of(stream, words, generator) / words for _ in range(draws)])
    mean = float(ratios.mean())
    wider = float(1 / np.sqrt(1 - min(words / len(stream), _FULLEST)))
    low, high = (mean + (float(end) - mean) * wider for end in np.quantile(ratios, [0.025, 0.975]))
    # Rounding must not put the mean of equal numbers outside their range.
    return Estimate(mean, min(mean, low), max(mean, high))


def _types_of(stream: TokenStream, words: int, generator: np.random.Generator) -> int:
    import numpy as np

    captions = stream.captions
    # Enough captions, most likely; all of them where not.
    guess = min(captions, int(words / len(stream) * captions * 1.3) + 20)
    drawn = generator.choice(captions, guess, replace=False) if guess < captions else generator.permutation(captions)
    if stream.counts[drawn].sum() < words:
        drawn = generator.permutation(captions)
    needed = int(np.searchsorted(np.cumsum(stream.counts[drawn]), words)) + 1
    is_seen = np.zeros(len(stream.vocabulary), dtype=bool)
    is_seen[stream.take(drawn[:needed])[:words]] = True
    return int(is_seen.sum())


def ttr_at_sizes(stream: TokenStream, sizes: Sequence[int] = TTR_SIZES, *, seed: int = 0) -> dict[int, Estimate]:
    """:func:`ttr_at` for every size that the captions have the words for."""
    return {
        size: ttr_at(stream, size, draws=100 if size <= 10_000 else 20, seed=seed)
        for size in sizes
        if size <= len(stream)
    }


def distinct(stream: TokenStream, n: int) -> float | None:
    """Distinct n-grams / n-grams inside captions (n of 1 or 2); None where no caption has n words."""
    import numpy as np

    if n == 1:
        return len(stream.vocabulary) / len(stream) if len(stream) else None
    if n != 2:
        raise ValueError(f"distinct-{n} was asked for; allowed are 1 and 2")
    row_of = np.repeat(np.arange(stream.captions), stream.counts)
    is_inside = row_of[1:] == row_of[:-1]
    pairs = stream.ids[:-1].astype(np.int64) * len(stream.vocabulary) + stream.ids[1:]
    pairs = np.sort(pairs[is_inside])
    return (int((pairs[1:] != pairs[:-1]).sum()) + 1) / len(pairs) if len(pairs) else None


def vocabulary_growth(
    stream: TokenStream, *, points: int = 60, orders: int = 3, seed: int = 0
) -> list[tuple[int, int]]:
    """Distinct words after so many words, captions in random order: pairs (words, distinct words), rising.

    Args:
        points: Sizes, evenly spaced on a logarithmic scale from 100 words.
        orders: Random orders that are averaged over.
    """
    import numpy as np

    total = len(stream)
    if not total:
        return []
    sizes = np.unique(np.geomspace(min(100, total), total, points).round().astype(np.int64))
    generator = np.random.default_rng(seed)
    found = np.zeros(len(sizes))
    for _ in range(orders):
        ids = stream.take(generator.permutation(stream.captions))
        first = np.full(len(stream.vocabulary), total)
        first[ids[::-1]] = np.arange(total)[::-1]  # of several values for one place the last one stays
        found += np.searchsorted(np.sort(first), sizes)
    return [(int(size), round(float(mean))) for size, mean in zip(sizes, found / orders, strict=True)]
