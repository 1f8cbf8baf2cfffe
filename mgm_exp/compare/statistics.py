"""Is B better than A, by how much, and how surely? Paired statistics over per-question scores.

Two runs that answered the same questions are compared question by question: most of what makes a question easy or
hard cancels, and the same data decide gaps that an unpaired test cannot see. Questions about one image are not
independent, so standard errors and resampling can be clustered by image.

Everywhere ``a`` is the baseline, ``b`` the candidate, and a difference is mean(b) - mean(a): positive means that b is
better. Scores are numbers in 0..1, one for each question, in the same order. Everything random is seeded.

Only numpy and the standard library; no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Labels = Sequence[Hashable] | NDArray[np.generic]

_NORMAL = NormalDist()
_CHUNK_ELEMENTS = 4_000_000
"""Random draws held at once: bounds memory to some 64 MB whatever the number of questions."""


class Interval(NamedTuple):
    """Both ends of a confidence interval."""

    low: float
    high: float


class PairedDifference(NamedTuple):
    """mean(b) - mean(a) over paired questions.

    Args:
        difference: Mean paired difference.
        standard_error: Of the difference; clustered where clusters were given.
        ci_low, ci_high: Normal 95 % interval.
        n: Questions.
        n_clusters: Clusters (images); n without clusters.
    """

    difference: float
    standard_error: float
    ci_low: float
    ci_high: float
    n: int
    n_clusters: int


def z_value(confidence: float) -> float:
    """Two-sided normal quantile: 1.96 for a confidence of 0.95."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1, both excluded")
    return _NORMAL.inv_cdf((1 + confidence) / 2)


# -- one rate -------------------------------------------------------------------------------------------------------


def wilson_interval(k: float, n: float, confidence: float = 0.95) -> Interval:
    """Wilson score interval of a rate; never leaves 0..1 and has a width even at 0 % and 100 %.

    Args:
        k: Right answers; may be fractional (mean score times n, which gives an interval that is rather too wide).
        n: Questions; may be fractional (an effective number).

    Raises:
        ValueError: unless 0 <= k <= n and n > 0.

    Source: Wilson 1927.
    """
    if not (n > 0 and 0 <= k <= n):
        raise ValueError(f"wilson_interval(k={k}, n={n}): needs 0 <= k <= n and n above 0")
    z = z_value(confidence)
    rate = k / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return Interval(0.0 if k == 0 else max(0.0, centre - half), 1.0 if k == n else min(1.0, centre + half))


# -- paired tests ----------------------------------------------------------------------------------------------------


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided exact McNemar test: the binomial test on the questions that only one of two runs got right.

    Args:
        b: Questions that only the first run got right.
        c: Questions that only the second run got right.

    Returns:
        p; 1.0 where the runs never disagree.

    Raises:
        ValueError: a count is negative or not whole.

    Source: McNemar 1947.
    """
    if b < 0 or c < 0 or b != int(b) or c != int(c):
        raise ValueError(f"mcnemar_exact(b={b}, c={c}): counts must be whole numbers, 0 or above")
    n, fewer = int(b) + int(c), int(min(b, c))
    if n == 0:
        return 1.0
    # log C(n, k) + n log(1/2), summed from the largest term down for accuracy with large counts.
    all_orders = math.lgamma(n + 1) - n * math.log(2)
    logs = [all_orders - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(fewer + 1)]
    largest = logs[-1]
    tail = math.exp(largest) * math.fsum(math.exp(value - largest) for value in logs)
    return min(1.0, 2 * tail)


def sign_flip_permutation(a: ArrayLike, b: ArrayLike, n: int, seed: int, clusters: Labels | None = None) -> float:
    """Two-sided paired permutation test of mean(b) - mean(a): under no difference each difference may change its sign.

    All sign patterns are gone through where there are no more than ``n`` of them; else ``n`` are drawn.

    Args:
        a, b: Scores of baseline and candidate, (questions,).
        n: Sign patterns that are drawn.
        seed: Of the draws.
        clusters: Label of each question (its image): all differences of a cluster flip together. None: each by itself.

    Returns:
        p, never 0: (patterns at least as extreme + 1) / (n + 1).

    Raises:
        ValueError: scores are not finite or of unequal length, or n is below 1.
    """
    first, second = _paired(a, b)
    return float(sign_flip_p_values((second - first)[:, None], n, seed, clusters)[0])


def sign_flip_p_values(differences: ArrayLike, n: int, seed: int, clusters: Labels | None = None) -> Floats:
    """:func:`sign_flip_permutation` for many candidates against one baseline, with the same sign patterns for all.

    Args:
        differences: (questions, candidates).

    Returns:
        p of each candidate, (candidates,).
    """
    matrix = _matrix(differences)
    with_zero = np.column_stack([np.zeros(len(matrix)), matrix])
    pairs = [(0, place + 1) for place in range(matrix.shape[1])]
    return pairwise_sign_flip_p_values(with_zero, pairs, n, seed, clusters)


def pairwise_sign_flip_p_values(
    values: ArrayLike, pairs: Sequence[tuple[int, int]], n: int, seed: int, clusters: Labels | None = None
) -> Floats:
    """:func:`sign_flip_permutation` for pairs of columns, with the same sign patterns for all.

    Args:
        values: Scores, (questions, columns).
        pairs: Baseline's and candidate's column of each pair.

    Returns:
        p of each pair, (pairs,).
    """
    sums = _cluster_sums(_matrix(values), clusters)[0]
    if n < 1:
        raise ValueError(f"n={n} permutations were asked for; at least 1 is needed")
    p = np.empty(len(pairs))
    drawn = []
    for place, (a, b) in enumerate(pairs):
        column = sums[:, b] - sums[:, a]
        if 2 ** min(62, int(np.count_nonzero(np.abs(column) > 1e-9))) <= n:
            p[place] = _exact_sign_flip(np.where(np.abs(column) > 1e-9, column, 0.0))
        else:
            drawn.append(place)
    if drawn:
        p[drawn] = _drawn_sign_flip(sums, np.array([pairs[place] for place in drawn]), n, seed)
    return p


def _exact_sign_flip(column: Floats) -> float:
    """Goes through all sign patterns."""
    moved = np.abs(column[column != 0])
    if moved.size == 0:
        return 1.0
    signs = 1 - 2 * ((np.arange(2**moved.size)[:, None] >> np.arange(moved.size)) & 1)
    sums = np.abs(signs @ moved)
    observed = abs(float(column.sum()))
    return float(np.mean(sums >= observed - _tolerance(moved)))


def _drawn_sign_flip(sums: Floats, pairs: NDArray[np.int64], n: int, seed: int) -> Floats:
    """Draws ``n`` sign patterns. Flipping signs of a difference is flipping those of both columns: once for each."""
    generator = np.random.Generator(np.random.PCG64(seed))
    columns, scale = _as_small_integers(sums)
    first, second = pairs[:, 0], pairs[:, 1]
    observed = np.abs(sums[:, second].sum(axis=0) - sums[:, first].sum(axis=0)) * scale  # (pairs,)
    slack = scale * np.array([_tolerance(sums[:, b] - sums[:, a]) for a, b in pairs])
    least = observed - slack
    totals = columns.sum(axis=0, dtype=np.float64)
    extreme = np.zeros(len(pairs), dtype=np.int64)
    for size in _chunks(n, len(sums)):
        bits = generator.integers(0, 2, size=(size, len(sums)), dtype=np.int8)
        flipped = totals - 2 * (bits.astype(columns.dtype) @ columns).astype(np.float64)  # (size, columns)
        extreme += (np.abs(flipped[:, second] - flipped[:, first]) >= least).sum(axis=0)
    return (extreme + 1) / (n + 1)


def _tolerance(column: Floats) -> float:
    """Sums that are equal on paper (0.3 + 0.6 and 0.9) must count as equal."""
    return 1e-9 * max(1.0, float(np.abs(column).sum()))


# -- differences and their intervals ---------------------------------------------------------------------------------


def paired_difference(a: ArrayLike, b: ArrayLike, clusters: Labels | None = None) -> PairedDifference:
    """Mean difference b - a with its standard error and a normal 95 % interval.

    The clustered standard error is sqrt(sum over clusters of (sum of deviations in it)^2) / n.

    Args:
        a, b: Scores of baseline and candidate, (questions,).
        clusters: Label of each question (its image). None: questions are independent.

    Raises:
        ValueError: scores are not finite, of unequal length, or none.

    Source: Miller 2024, "Adding error bars to evals" (arXiv 2411.00640).
    """
    first, second = _paired(a, b)
    d = second - first
    n = len(d)
    mean = float(d.mean())
    error = float(standard_errors(d[:, None], clusters)[0])
    n_clusters = n if clusters is None else len(_cluster_sums(d[:, None], clusters)[1])
    half = z_value(0.95) * error
    return PairedDifference(mean, error, mean - half, mean + half, n, n_clusters)


def standard_errors(values: ArrayLike, clusters: Labels | None = None) -> Floats:
    """Standard error of each column's mean, clustered as in :func:`paired_difference`; infinite for one cluster.

    Args:
        values: Scores or differences, (questions, columns).
        clusters: Label of each question (its image). None: questions are independent.

    Returns:
        (columns,).
    """
    matrix = _matrix(values)
    n = len(matrix)
    if clusters is None:
        return matrix.std(axis=0, ddof=1) / math.sqrt(n) if n > 1 else np.full(matrix.shape[1], math.inf)
    sums, _ = _cluster_sums(matrix - matrix.mean(axis=0), clusters)
    return np.sqrt((sums**2).sum(axis=0)) / n if len(sums) > 1 else np.full(matrix.shape[1], math.inf)


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, n: int, seed: int, clusters: Labels | None = None, confidence: float = 0.95
) -> Interval:
    """Percentile bootstrap interval of mean(b) - mean(a): questions (or whole clusters) are drawn with replacement.

    Args:
        a, b: Scores of baseline and candidate, (questions,).
        n: Resamples.
        seed: Of PCG64, so that the interval can be reproduced.
        clusters: Label of each question (its image): a cluster is drawn with all its questions.

    Raises:
        ValueError: scores are not finite, of unequal length, or none; or n is below 1.

    Source: Efron 1979.
    """
    first, second = _paired(a, b)
    low, high = bootstrap_intervals((second - first)[:, None], n, seed, clusters, confidence)
    return Interval(float(low[0]), float(high[0]))


def bootstrap_intervals(
    values: ArrayLike, n: int, seed: int, clusters: Labels | None = None, confidence: float = 0.95
) -> tuple[Floats, Floats]:
    """Percentile bootstrap intervals of column means, with the same resamples for every column.

    Args:
        values: (questions, columns): scores of runs, or differences.

    Returns:
        Lower and upper ends, (columns,) each.
    """
    means = resampled_means(values, n, seed, clusters)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    return low, high


def resampled_means(values: ArrayLike, n: int, seed: int, clusters: Labels | None = None) -> Floats:
    """Column means of ``n`` bootstrap resamples, the same resamples for every column.

    Args:
        values: (questions, columns).

    Returns:
        (n, columns): the difference of two columns is the resampled difference of two runs.
    """
    matrix = _matrix(values)
    if n < 1:
        raise ValueError(f"n={n} resamples were asked for; at least 1 is needed")
    sums, sizes = _cluster_sums(matrix, clusters)
    drawn = len(sums)
    generator = np.random.Generator(np.random.PCG64(seed))
    small, scale = _as_small_integers(sums, drawn)
    with_sizes = np.column_stack([small, sizes.astype(small.dtype)])  # the last column counts the questions drawn
    means = np.empty((n, matrix.shape[1]))
    done = 0
    for size in _chunks(n, drawn):
        rows = generator.integers(0, drawn, size=(size, drawn))
        rows += np.arange(size)[:, None] * drawn
        times_drawn = np.bincount(rows.ravel(), minlength=size * drawn).reshape(size, drawn)
        totals = (times_drawn.astype(with_sizes.dtype) @ with_sizes).astype(np.float64)  # (size, columns + 1)
        means[done : done + size] = totals[:, :-1] / (totals[:, -1:] * scale)
        done += size
    return means


def _as_small_integers(values: Floats, times: int = 1) -> tuple[NDArray[np.floating[Any]], int]:
    """Values times 1, 10 or 100 in single precision where every sum stays exact in it, else as they are.

    VQA scores are tenths: sums of whole numbers below 2 ** 24 lose nothing, and take half the time and memory.

    Args:
        times: How often one value may be counted, over and above all being summed once.
    """
    largest = float(np.abs(values).max(initial=0.0)) * times + float(np.abs(values).sum(axis=0).max(initial=0.0))
    for scale in (1, 10, 100):
        if 2 * largest * scale >= 2**24:
            break
        whole = np.rint(values * scale)
        if np.abs(values * scale - whole).max(initial=0.0) < 1e-9:
            return whole.astype(np.float32), scale
    return values, 1


def design_effect(scores: ArrayLike, clusters: Labels) -> float:
    """Variance of the mean with clustering over the variance without; 1.0 where all scores are equal."""
    return float(design_effects(_vector(scores)[:, None], clusters)[0])


def design_effects(scores: ArrayLike, clusters: Labels) -> Floats:
    """:func:`design_effect` of each column, (questions, columns) -> (columns,)."""
    values = _matrix(scores)
    deviations = values - values.mean(axis=0)
    plain = (deviations**2).sum(axis=0)
    sums, _ = _cluster_sums(deviations, clusters)
    return np.where(plain > 1e-12, (sums**2).sum(axis=0) / np.maximum(plain, 1e-12), 1.0)


# -- many comparisons ------------------------------------------------------------------------------------------------


def holm(p: Sequence[float]) -> list[float]:
    """Holm-adjusted p-values: all claims with an adjusted p below alpha are true together with probability 1 - alpha.

    Source: Holm 1979.
    """
    values = _p_values(p)
    adjusted = np.empty_like(values)
    order = np.argsort(values, kind="stable")
    factors = np.arange(len(values), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(values[order] * factors))
    return [float(value) for value in adjusted]


def benjamini_hochberg(p: Sequence[float]) -> list[float]:
    """Benjamini-Hochberg adjusted p-values: of the claims below alpha, a share of at most alpha is expected wrong.

    Source: Benjamini and Hochberg 1995.
    """
    values = _p_values(p)
    adjusted = np.empty_like(values)
    order = np.argsort(values, kind="stable")[::-1]
    factors = len(values) / np.arange(len(values), 0, -1)
    adjusted[order] = np.minimum(1.0, np.minimum.accumulate(values[order] * factors))
    return [float(value) for value in adjusted]


# -- power -----------------------------------------------------------------------------------------------------------


def minimum_detectable_difference(standard_error: float, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest true difference that a two-sided test at ``alpha`` finds with probability ``power``."""
    return (z_value(1 - alpha) + _NORMAL.inv_cdf(power)) * standard_error


def questions_needed(
    delta: float,
    omega2: float,
    sigma2_a: float = 0.0,
    sigma2_b: float = 0.0,
    samples: int = 1,
    alpha: float = 0.05,
    power: float = 0.8,
) -> float:
    """Questions needed to find a true paired difference.

    Args:
        delta: The difference, 0.01 for one point.
        omega2: Variance of the paired differences between questions.
        sigma2_a, sigma2_b: Variance between answers of one run to the same question (0 for greedy decoding).
        samples: Answers (or seeds) that are averaged for each question.

    Source: Miller 2024 (arXiv 2411.00640), section 5.
    """
    if delta == 0:
        raise ValueError("delta=0: no number of questions finds a difference of zero")
    quantiles = z_value(1 - alpha) + _NORMAL.inv_cdf(power)
    return quantiles**2 * (omega2 + sigma2_a / samples + sigma2_b / samples) / delta**2


# -- several seeds and tasks ------------------------------------------------------------------------------------------


def interquartile_mean(values: ArrayLike) -> float:
    """Mean of the middle half, a quarter cut off at both ends (Agarwal et al. 2021, rliable)."""
    ordered = np.sort(np.asarray(values, dtype=np.float64).ravel())
    cut = int(0.25 * ordered.size)
    return float(ordered[cut : ordered.size - cut].mean())


def probability_of_improvement(a: ArrayLike, b: ArrayLike) -> float:
    """Mean over tasks of P(b > a) + P(b = a) / 2 over pairs of seeds; both (seeds, tasks) (Agarwal et al. 2021)."""
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    higher = second[:, None, :] > first[None, :, :]
    equal = second[:, None, :] == first[None, :, :]
    return float((higher + 0.5 * equal).mean(axis=(0, 1)).mean())


def stratified_bootstrap(
    scores: ArrayLike, statistic: Callable[[Floats], float], n: int, seed: int, confidence: float = 0.95
) -> Interval:
    """Percentile bootstrap interval of a statistic of (seeds, tasks): seeds are drawn for each task by itself.

    Source: Agarwal et al. 2021 (rliable).
    """
    matrix = _matrix(scores)
    if n < 1:
        raise ValueError(f"n={n} resamples were asked for; at least 1 is needed")
    generator = np.random.Generator(np.random.PCG64(seed))
    columns = np.arange(matrix.shape[1])
    drawn = [statistic(matrix[generator.integers(0, len(matrix), matrix.shape), columns]) for _ in range(n)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Interval(float(low), float(high))


# -- shapes and checks -------------------------------------------------------------------------------------------------


def _matrix(values: ArrayLike) -> Floats:
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2 or len(matrix) == 0:
        raise ValueError(f"scores of shape {matrix.shape} were given; (questions, columns) with at least one is needed")
    if not np.isfinite(matrix).all():
        raise ValueError("scores hold NaN or infinite values; every question needs a finite score")
    return matrix


def _vector(values: ArrayLike) -> Floats:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1:
        raise ValueError(f"scores of shape {vector.shape} were given; one number a question is needed")
    return _matrix(vector[:, None])[:, 0]


def _paired(a: ArrayLike, b: ArrayLike) -> tuple[Floats, Floats]:
    first, second = _vector(a), _vector(b)
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} scores cannot be paired: the questions must be the same")
    return first, second


def cluster_sums(values: ArrayLike, clusters: Labels | None) -> Floats:
    """Sum of each cluster's rows, (questions, columns) -> (clusters, columns); the rows themselves without clusters."""
    return _cluster_sums(_matrix(values), clusters)[0]


def _cluster_sums(matrix: Floats, clusters: Labels | None) -> tuple[Floats, Floats]:
    """Sum of each cluster's rows and its number of rows: (clusters, columns), (clusters,)."""
    if clusters is None:
        return matrix, np.ones(len(matrix))
    labels = np.asarray(clusters) if isinstance(clusters, np.ndarray) else np.array(list(clusters), dtype=object)
    if labels.shape != (len(matrix),):
        raise ValueError(f"{labels.size} cluster labels were given for {len(matrix)} questions")
    codes = _codes(labels)
    sizes = np.bincount(codes)
    is_sorted = bool((np.diff(codes) >= 0).all())
    ordered = matrix if is_sorted else matrix[np.argsort(codes, kind="stable")]
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    return np.add.reduceat(ordered, starts, axis=0), sizes.astype(np.float64)


def _codes(labels: NDArray[np.generic]) -> NDArray[np.int64]:
    """Labels numbered from 0 in order of appearance."""
    if labels.dtype == np.int64 and labels.size and labels[0] == 0:
        highest = np.maximum.accumulate(labels)
        if labels.min() >= 0 and (np.diff(highest) <= 1).all():
            return labels.astype(np.int64)  # numbered so already
    seen: dict[Hashable, int] = {}
    return np.array([seen.setdefault(label, len(seen)) for label in labels.tolist()], dtype=np.int64)


def _p_values(p: Sequence[float]) -> Floats:
    values = np.asarray(p, dtype=np.float64)
    if values.ndim != 1 or not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"p-values must be a list of numbers in 0..1, not {p!r}")
    return values


def _chunks(total: int, width: int) -> Iterator[int]:
    """Sizes of the blocks in which ``total`` rows of ``width`` draws are made."""
    block = max(1, _CHUNK_ELEMENTS // max(1, width))
    for start in range(0, total, block):
        yield min(block, total - start)
