"""Compares two explored datasets, A and B: only what can be compared, and matched where they hold the same rows.

Rows are matched by id; on matched rows the difference of each caption is taken, which is far more certain than the
difference of two means. Diversity is compared as MATTR-50 and as TTR of equally many words. Ratios over whole datasets
of different sizes are not compared: they are listed as refused, with the sizes.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mgm_exp.data.exploration.diversity import TTR_SIZES, Estimate, moving_average_ttr, ttr_at
from mgm_exp.data.exploration.exploration import SCHEMA_VERSION, Exploration
from mgm_exp.data.exploration.text import TOO_SHORT
from mgm_exp.data.exploration.tokens import TokenStream
from mgm_exp.errors import DataError

if TYPE_CHECKING:
    import numpy as np

_Z = 1.959964  # of a 95 % interval
_FEWEST = 20  # matched rows that say something
_LARGEST_SHARE = 0.5  # of the words of the smaller one that are drawn at most, so that draws differ
_WORDS = 15
SHARES = ("fewer than", "special characters", "repetition")
"""What the names of means that are shares begin with."""


@dataclass(frozen=True)
class Difference:
    """One measure of A and of B.

    Args:
        name: Of the measure.
        a, b: Its values.
        difference: b - a; None: not to be compared.
        ci_low, ci_high: 95 % interval of the difference.
        n_a, n_b: What it was counted over.
        unit: Of n: captions or words.
        is_paired: Whether it is over matched rows.
        refused: Why it is not compared; empty: it is.
    """

    name: str
    a: float | None
    b: float | None
    difference: float | None
    ci_low: float | None
    ci_high: float | None
    n_a: int
    n_b: int
    unit: str = "captions"
    is_paired: bool = False
    refused: str = ""

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.ci_low is not None and self.ci_high is not None and (self.ci_low > 0 or self.ci_high < 0)


@dataclass(frozen=True)
class Comparison:
    """Two explorations side by side.

    Args:
        a, b: The explorations.
        content: ``explore.json`` of the comparison.
        differences: Of all that was measured.
        matched_a, matched_b: Captions of rows with the same id, as places in A and in B.
    """

    a: Exploration
    b: Exploration
    content: dict[str, Any]
    differences: list[Difference]
    matched_a: np.ndarray
    matched_b: np.ndarray


def compare_explorations(a: Exploration, b: Exploration, *, seed: int = 0) -> Comparison:
    """Compares two datasets.

    Args:
        a, b: As explored; a difference is b - a.
        seed: Of the subsamples.

    Raises:
        DataError: one of them has no words.
    """
    for exploration in (a, b):
        if not len(exploration.values.stream):
            raise DataError(f"{exploration.name} has no words, so there is nothing to compare.")
    matched_a, matched_b = matched_captions(a, b)
    differences = [*_means(a, b), *_diversity(a.values.stream, b.values.stream, seed), *_refused(a, b)]
    changed = int((a.values.hashes[matched_a] != b.values.hashes[matched_b]).sum())
    paired = {"captions": len(matched_a), "changed": changed}
    if len(matched_a) >= _FEWEST and changed:  # captions that are the same have no differences
        differences += _paired(a, b, matched_a, matched_b, seed)
    content = {
        "schema_version": SCHEMA_VERSION,
        "a": a.content,
        "b": b.content,
        "comparison": {
            "differences": [asdict(item) for item in differences],
            "paired": paired,
            "words": _words(a.values.stream.case_folded(), b.values.stream.case_folded()),
            "images": _images(a, b),
        },
    }
    return Comparison(a, b, content, differences, matched_a, matched_b)


def matched_captions(a: Exploration, b: Exploration) -> tuple[np.ndarray, np.ndarray]:
    """Captions of rows that have one caption and an id that occurs in both: places in A and in B, in A's order."""
    import numpy as np

    single_a, single_b = _single(a), _single(b)
    place_of = {b.rows.ids[row]: place for row, place in single_b}
    pairs = [(place, place_of[name]) for row, place in single_a if (name := a.rows.ids[row]) in place_of]
    found = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def _single(exploration: Exploration) -> list[tuple[int, int]]:
    """(row, place of its caption) of rows with one caption."""
    import numpy as np

    rows = exploration.rows.text_row
    counts = np.bincount(rows, minlength=len(exploration.rows))
    is_single = counts[rows] == 1
    return list(zip(rows[is_single].tolist(), np.flatnonzero(is_single).tolist(), strict=True))


def _columns(exploration: Exploration) -> dict[str, np.ndarray]:
    """What is averaged over captions."""
    values = exploration.values
    columns = {
        "words": values.stream.counts,
        "characters": values.table.text_length,
        f"fewer than {TOO_SHORT} words": values.stream.counts < TOO_SHORT,
        "special characters": values.table.special_characters,
        "repetition, 2 words": values.table.word_repetition[2],
        "repetition, 5 characters": values.table.character_repetition[5],
    }
    if values.tokens is not None:
        columns["tokens of the model"] = values.tokens
    return columns


def _means(a: Exploration, b: Exploration) -> list[Difference]:
    """Means over all captions, with an interval as of two independent samples (Welch)."""
    found = []
    others = _columns(b)
    for name, x in _columns(a).items():
        if name not in others:
            continue
        y = others[name]
        error = math.sqrt(float(x.var()) / max(len(x), 1) + float(y.var()) / max(len(y), 1))
        found.append(_with_error(name, float(x.mean()), float(y.mean()), error, len(x), len(y)))
    return found


def _with_error(name: str, a: float, b: float, error: float, n_a: int, n_b: int, **more: Any) -> Difference:
    low, high = b - a - _Z * error, b - a + _Z * error
    if name.startswith(SHARES):
        low, high = _of_shares(low, high)
    return Difference(name, a, b, b - a, low, high, n_a, n_b, **more)


def _of_shares(low: float, high: float) -> tuple[float, float]:
    """An interval of a difference between two numbers that lie in 0..1."""
    return max(-1.0, low), min(1.0, high)


def _diversity(a: TokenStream, b: TokenStream, seed: int) -> list[Difference]:
    """MATTR-50, and TTR of equally many words."""
    found = [
        _of_estimates("MATTR-50", moving_average_ttr(a, seed=seed), moving_average_ttr(b, seed=seed), len(a), len(b))
    ]
    for size in matched_sizes(a, b):
        pair = ttr_at(a, size, seed=seed), ttr_at(b, size, seed=seed)
        found.append(_of_estimates(f"TTR at {size:,} words", *pair, size, size))
    return found


def matched_sizes(a: TokenStream, b: TokenStream) -> list[int]:
    """Sizes at which two datasets are compared: the fixed ones up to half of the smaller one, or that half."""
    most = int(min(len(a), len(b)) * _LARGEST_SHARE)
    fixed = [size for size in TTR_SIZES if size <= most]
    return fixed or [size for size in (most,) if size >= 50]


def _of_estimates(name: str, a: Estimate, b: Estimate, n_a: int, n_b: int) -> Difference:
    difference = None if a.value is None or b.value is None else b.value - a.value
    low, high = None, None
    if difference is not None and None not in (a.ci_low, a.ci_high, b.ci_low, b.ci_high):
        assert a.ci_low is not None and a.ci_high is not None and b.ci_low is not None and b.ci_high is not None
        half = math.hypot((a.ci_high - a.ci_low) / 2, (b.ci_high - b.ci_low) / 2)
        low, high = _of_shares(difference - half, difference + half)
    return Difference(name, a.value, b.value, difference, low, high, n_a, n_b, unit="words")


def _refused(a: Exploration, b: Exploration) -> list[Difference]:
    """What depends on size: listed with its values, compared only where the sizes are equal."""
    found = []
    n_a, n_b = len(a.values.stream), len(b.values.stream)
    for key, name in (("distinct_1", "distinct words / all words"), ("distinct_2", "distinct pairs / all pairs")):
        x, y = a.content["text"][key], b.content["text"][key]
        why = "" if n_a == n_b else f"it depends on size: A has {n_a:,} words, B has {n_b:,}"
        difference = None if why or x is None or y is None else y - x
        found.append(Difference(name, x, y, difference, None, None, n_a, n_b, "words", refused=why))
    return found


def _paired(
    a: Exploration, b: Exploration, matched_a: np.ndarray, matched_b: np.ndarray, seed: int
) -> list[Difference]:
    """Differences caption by caption, over the rows that both have."""
    import numpy as np

    found = []
    others = _columns(b)
    count = len(matched_a)
    for name, column in _columns(a).items():
        if name in others:
            x, y = column[matched_a].astype(np.float64), others[name][matched_b].astype(np.float64)
            error = float((y - x).std()) / math.sqrt(count)
            found.append(_with_error(name, float(x.mean()), float(y.mean()), error, count, count, is_paired=True))
    streams = []
    for exploration, places in ((a, matched_a), (b, matched_b)):
        stream = exploration.values.stream
        streams.append(TokenStream(stream.take(places), stream.counts[places], stream.vocabulary).trimmed())
    for item in _diversity(streams[0], streams[1], seed):
        found.append(Difference(**{**asdict(item), "is_paired": True}))
    return found


def _words(a: TokenStream, b: TokenStream) -> dict[str, list[dict[str, Any]]]:
    """Words that are much more frequent in one of the two, by the weight of evidence (log-likelihood ratio).

    Dunning (1993). The share of a word is per thousand words.
    """
    counts_a = dict(zip(a.vocabulary, a.frequencies().tolist(), strict=True))
    counts_b = dict(zip(b.vocabulary, b.frequencies().tolist(), strict=True))
    found = []
    for word in counts_a.keys() | counts_b.keys():
        x, y = counts_a.get(word, 0), counts_b.get(word, 0)
        both = (x + y) / (len(a) + len(b))
        evidence = sum(n * math.log(n / (size * both)) for n, size in ((x, len(a)), (y, len(b))) if n)
        found.append((evidence, word, x / len(a) * 1000, y / len(b) * 1000))
    found.sort(key=lambda item: (-item[0], item[1]))

    def rows(is_wanted: Any) -> list[dict[str, Any]]:
        wanted = [item for item in found if is_wanted(item)][:_WORDS]
        return [{"word": word, "per_thousand_a": x, "per_thousand_b": y} for _, word, x, y in wanted]

    return {"more_in_a": rows(lambda item: item[2] > item[3]), "more_in_b": rows(lambda item: item[3] > item[2])}


def _images(a: Exploration, b: Exploration) -> dict[str, int] | None:
    """How many pictures both have, byte for byte."""
    import numpy as np

    if a.facts is None or b.facts is None:
        return None
    x, y = (np.unique(facts.sha256[facts.is_usable]) for facts in (a.facts, b.facts))
    return {
        "in_both": len(np.intersect1d(x, y)),
        "only_in_a": len(np.setdiff1d(x, y)),
        "only_in_b": len(np.setdiff1d(y, x)),
    }
