"""Arms with several seeds: the variance between seeds beside the variance between questions.

The score of an arm is the mean over its seeds and questions. Another seed would give another model, another set of
questions other scores; both are drawn:

- standard error: sqrt(variance between questions, clustered by image, + variance between seeds / seeds, of each arm);
- p: Student's t with Satterthwaite's degrees of freedom (few seeds say little about their variance);
- interval: the wider one of Student's and a hierarchical bootstrap, which draws seeds, then images. Its seeds are
  spread by sqrt(seeds / (seeds - 1)), since few draws underestimate their variance.

An arm with one seed borrows the variance between seeds of the others (pooled). The variance between questions already
holds a part of that between seeds, so intervals are rather too wide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mgm_exp.compare import statistics as stats
from mgm_exp.compare import student
from mgm_exp.compare.statistics import Floats

Columns = Sequence[Sequence[int]]
"""For each arm, the columns of its runs."""


class Spread(NamedTuple):
    """How much an arm's mean moves with its seeds.

    Args:
        variance: Of the mean over seeds: variance between seeds / number of seeds.
        df: Degrees of freedom that it was estimated with.
    """

    variance: float
    df: float


class SeedTest(NamedTuple):
    """A difference between two arms, seeds and questions drawn."""

    difference: float
    standard_error: float
    seed_error: float
    df: float
    p_value: float
    ci_low: float
    ci_high: float


@dataclass(frozen=True)
class Seeded:
    """Scores of arms on the same questions, some with several seeds.

    Args:
        scores: (questions, runs).
        columns: For each arm, the columns of its runs.
        clusters: Image of each question; None: questions are independent.
    """

    scores: Floats
    columns: Columns
    clusters: NDArray[np.int64] | None

    def means(self) -> Floats:
        """Each question's mean over an arm's seeds, (questions, arms)."""
        return np.column_stack([self.scores[:, list(own)].mean(axis=1) for own in self.columns])

    def spreads(self) -> list[Spread]:
        """How much the mean of each arm moves with its seeds; an arm with one seed takes the pooled variance."""
        totals = self.scores.mean(axis=0)
        several = [totals[list(own)] for own in self.columns if len(own) > 1]
        df = sum(len(values) - 1 for values in several)
        pooled = sum(float(((values - values.mean()) ** 2).sum()) for values in several) / df if df else 0.0
        return [
            Spread(float(totals[list(own)].var(ddof=1)) / len(own), len(own) - 1)
            if len(own) > 1
            else Spread(pooled, max(df, 1))
            for own in self.columns
        ]

    def resampled(self, resamples: int, seed: int) -> Floats:
        """Means of each arm in resamples of seeds, then images, (resamples, arms); arms share the images drawn."""
        runs = stats.resampled_means(self.scores, resamples, seed, self.clusters)
        generator = np.random.Generator(np.random.PCG64([seed, 1]))
        found = np.empty((resamples, len(self.columns)))
        for place, (own, spread) in enumerate(zip(self.columns, self.spreads(), strict=True)):
            means = runs[:, list(own)]  # (resamples, seeds)
            n = len(own)
            centre = means.mean(axis=1)
            if n == 1:
                found[:, place] = centre + generator.normal(0, math.sqrt(spread.variance), resamples)
                continue
            drawn = generator.multinomial(n, np.full(n, 1 / n), size=resamples) / n
            found[:, place] = centre + math.sqrt(n / (n - 1)) * ((drawn * means).sum(axis=1) - centre)
        return found


def seed_tests(seeded: Seeded, pairs: Sequence[tuple[int, int]], resamples: int, seed: int) -> list[SeedTest]:
    """Differences b - a between arms.

    Args:
        pairs: Places of baseline and candidate among the arms.
    """
    means, spreads = seeded.means(), seeded.spreads()
    drawn = seeded.resampled(resamples, seed)
    found = []
    for a, b in pairs:
        difference = means[:, b] - means[:, a]
        between = drawn[:, b] - drawn[:, a]
        found.append(_test(difference, seeded.clusters, [spreads[a], spreads[b]], between))
    return found


def arm_intervals(seeded: Seeded, resamples: int, seed: int) -> list[SeedTest]:
    """Mean score of each arm with its interval, kept in 0..1; p is that of a mean of zero, and of no use."""
    means, drawn = seeded.means(), seeded.resampled(resamples, seed)
    tests = [
        _test(means[:, place], seeded.clusters, [spread], drawn[:, place])
        for place, spread in enumerate(seeded.spreads())
    ]
    return [test._replace(ci_low=max(0.0, test.ci_low), ci_high=min(1.0, test.ci_high)) for test in tests]


def _test(values: Floats, clusters: NDArray[np.int64] | None, spreads: Sequence[Spread], drawn: Floats) -> SeedTest:
    n = len(values)
    n_clusters = n if clusters is None else int(clusters.max()) + 1
    error = float(stats.standard_errors(values[:, None], clusters)[0])
    mean = float(values.mean())
    if not math.isfinite(error):
        return SeedTest(mean, math.inf, math.nan, 1.0, 1.0, -1.0, 1.0)
    parts = [Spread(error**2, n_clusters - 1), *spreads]
    variance = sum(part.variance for part in parts)
    below = sum(part.variance**2 / part.df for part in parts)
    df = variance**2 / below if below > 0 else float(n_clusters - 1)
    # Arms that agree everywhere would be sure of anything: one disagreement is the least assumed.
    total = max(math.sqrt(variance), 1 / n)
    p = float(student.two_sided_p(mean / total, df))
    half = student.quantile(0.975, df) * math.sqrt(variance)
    low, high = np.quantile(drawn, [0.025, 0.975])
    seed_error = math.sqrt(sum(spread.variance for spread in spreads))
    return SeedTest(mean, total, seed_error, df, p, min(mean - half, float(low)), max(mean + half, float(high)))
