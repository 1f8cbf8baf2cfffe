"""Statistics of captions: how many, how long, how short, how varied, how often the same.

    text_statistics(captions)       # the numbers that a run records and a comparison shows

Words are what stands between white space, as written, in captions without special tokens. Standard deviations are
those of the captions at hand (divided by n).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mgm_exp.data.exploration.diversity import TTR_SIZES, distinct, moving_average_ttr, ttr_at_sizes
from mgm_exp.data.exploration.tokens import TokenStream, TokenStreamBuilder, chunks

if TYPE_CHECKING:
    import numpy as np

TOO_SHORT = 4
"""Captions with fewer words are too short."""

PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)
_CHUNK = 16384


def text_statistics(captions: Iterable[str], *, seed: int = 0) -> dict[str, Any]:
    """The core statistics of captions, in one pass over them.

    Args:
        captions: Without special tokens; a stream is read once, a chunk in memory at a time.
        seed: Of the subsamples that TTR at fixed sizes is measured on.

    Returns:
        The keys of ``text`` in ``explore.json`` that need nothing but the captions (docs/exploration.md). Numbers that
        do not exist (the mean of nothing) are None.
    """
    import numpy as np

    builder = TokenStreamBuilder()
    characters: list[np.ndarray] = []
    distinct_captions: set[int] = set()
    for chunk in chunks(captions, _CHUNK):
        builder.add(chunk)
        characters.append(np.fromiter(map(len, chunk), dtype=np.int64, count=len(chunk)))
        # 64 bits each; two different captions of ten million share them with a chance of one in 100,000.
        distinct_captions.update(map(hash, chunk))
    lengths = np.concatenate(characters) if characters else np.zeros(0, dtype=np.int64)
    return core_statistics(builder.finish(), lengths, len(distinct_captions), seed=seed)


def core_statistics(
    stream: TokenStream, characters: np.ndarray, distinct_captions: int, *, seed: int
) -> dict[str, Any]:
    """The result of :func:`text_statistics` from counted captions.

    Args:
        stream: Their words.
        characters: Characters of each caption.
        distinct_captions: Captions that differ from each other.
    """
    rows, words = stream.captions, stream.counts
    mattr = moving_average_ttr(stream, seed=seed)
    sizes = ttr_at_sizes(stream, TTR_SIZES, seed=seed)
    return {
        "captions": rows,
        "words_mean": _mean(words),
        "words_median": _quantile(words, 50),
        "words_std": float(words.std()) if rows else None,
        "words_percentiles": {str(p): _quantile(words, p) for p in PERCENTILES},
        "characters_mean": _mean(characters),
        "characters_percentiles": {str(p): _quantile(characters, p) for p in PERCENTILES},
        "empty": int((words == 0).sum()),
        "too_short_share": _mean(words < TOO_SHORT),
        "tokens": len(stream),
        "vocabulary": len(stream.vocabulary),
        "mattr_50": mattr.value,
        "mattr_50_interval": {"ci_low": mattr.ci_low, "ci_high": mattr.ci_high},
        "ttr_at": {str(size): estimate.to_json() for size, estimate in sizes.items()},
        "distinct_1": distinct(stream, 1),
        "distinct_2": distinct(stream, 2),
        "duplicate_share": 1 - distinct_captions / rows if rows else None,
    }


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _quantile(values: np.ndarray, percent: float) -> float | None:
    import numpy as np

    return float(np.percentile(values, percent)) if len(values) else None
