"""Which arms can be compared on a benchmark, and what comes out: differences, intervals, p-values, verdicts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mgm_exp.compare import statistics as stats
from mgm_exp.compare import student
from mgm_exp.compare.arms import Arm
from mgm_exp.compare.predictions import PairingError, Questions
from mgm_exp.compare.runs import Run, check_pair
from mgm_exp.compare.seeds import Seeded, seed_tests
from mgm_exp.compare.statistics import Floats

MOST_PERMUTED = 2_000
"""With more comparisons than these, p of soft scores is Student's: permutations would have to be drawn by the million
for their smallest p to pass the adjustment."""
_BLOCK = 256
_MOST_LEVELS = 16
"""Different scores up to which agreement is counted level by level."""

Places = tuple[int, int]


@dataclass(frozen=True)
class Panel:
    """Arms that answered the same questions of a benchmark in the same way.

    Args:
        benchmark: Its name.
        questions: What was asked.
        arms: The arms.
        columns: For each arm, the columns of its runs.
        scores: (questions, runs).
    """

    benchmark: str
    questions: Questions
    arms: tuple[Arm, ...]
    columns: tuple[tuple[int, ...], ...]
    scores: Floats

    @property
    def has_seeds(self) -> bool:
        """Whether some arm has several seeds."""
        return any(len(own) > 1 for own in self.columns)

    @cached_property
    def seeded(self) -> Seeded:
        return Seeded(self.scores, self.columns, self.questions.shared_clusters)

    @cached_property
    def means(self) -> Floats:
        """Each question's mean over an arm's seeds, (questions, arms)."""
        return self.seeded.means() if self.has_seeds else self.scores

    @cached_property
    def binary(self) -> list[bool]:
        """For each arm, whether its scores are 0 and 1 and come from one seed."""
        is_binary = [bool(np.isin(column, (0.0, 1.0)).all()) for column in self.scores.T]
        return [len(own) == 1 and is_binary[own[0]] for own in self.columns]


# -- who can be compared -----------------------------------------------------------------------------------------------


def panels(
    benchmark: str, arms: Sequence[Arm], baseline: Arm, strict: bool
) -> tuple[list[Panel], list[dict[str, Any]]]:
    """Arms in groups that can be compared; the baseline's first, if it has the benchmark.

    Args:
        strict: Whether what cannot be compared is an error.

    Returns:
        The groups, and what was refused (``a, b, benchmark, reason``).

    Raises:
        PairingError: see ``strict``.
    """
    groups: list[list[tuple[Arm, list[Run]]]] = []
    refused: list[dict[str, Any]] = []

    def refuse(a: Arm, name: str, error: PairingError) -> None:
        if strict:
            raise error
        refused.append({"a": a.id, "b": name, "benchmark": benchmark, "reason": str(error)})

    unreadable: PairingError | None = None
    for arm in sorted(arms, key=lambda arm: arm is not baseline):
        runs = [run for run in arm.completed if benchmark in run.benchmarks]
        if not runs:
            continue
        try:
            runs[0].predictions(benchmark)
        except PairingError as error:
            if arm is baseline:
                unreadable = error  # said of each pair with it
            else:
                refuse(baseline, arm.id, error)
            continue
        if unreadable is not None:
            refuse(baseline, arm.id, unreadable)
        members = [runs[0]]
        for run in runs[1:]:
            try:
                check_pair(runs[0], run, benchmark)
                members.append(run)
            except PairingError as error:
                refuse(arm, run.name, error)
        for group in groups:
            try:
                check_pair(group[0][1][0], runs[0], benchmark)
            except PairingError as error:
                if group[0][0] is baseline:
                    refuse(baseline, arm.id, error)
                continue
            group.append((arm, members))
            break
        else:
            groups.append([(arm, members)])
    return [_panel(benchmark, group, arms) for group in groups], refused


def _panel(benchmark: str, group: Sequence[tuple[Arm, Sequence[Run]]], order: Sequence[Arm]) -> Panel:
    ordered = sorted(group, key=lambda entry: order.index(entry[0]))
    columns: list[tuple[int, ...]] = []
    scores: list[Floats] = []
    for _, runs in ordered:
        columns.append(tuple(range(len(scores), len(scores) + len(runs))))
        scores += [run.predictions(benchmark).scores for run in runs]
    questions = ordered[0][1][0].predictions(benchmark).questions
    return Panel(benchmark, questions, tuple(arm for arm, _ in ordered), tuple(columns), np.column_stack(scores))


def wanted_pairs(panel: Panel, baseline: Arm, all_pairs: bool) -> list[Places]:
    """Each arm against the baseline; then, if asked for, each against each."""
    names = [arm.id for arm in panel.arms]
    first = names.index(baseline.id) if baseline.id in names else None
    others = [place for place in range(len(names)) if place != first]
    pairs = [] if first is None else [(first, place) for place in others]
    if all_pairs:
        pairs += [(a, b) for number, a in enumerate(others) for b in others[number + 1 :]]
    return pairs


# -- tests -------------------------------------------------------------------------------------------------------------


def pair_rows(
    panel: Panel, pairs: Sequence[Places], *, n_comparisons: int, resamples: int, seed: int, alpha: float
) -> list[dict[str, Any]]:
    """Difference, interval and p of pairs of arms; all share the resamples of the questions.

    Args:
        panel: The scores.
        pairs: Baseline's and candidate's place among the arms.
        n_comparisons: How many comparisons will be adjusted together.
        resamples: Of the bootstrap, and at least so many permutations.
        seed: Of everything random.
        alpha: Level of the verdicts.

    Returns:
        Entries of ``pairs`` in ``comparison.json``, up to ``p_by_image``.
    """
    if not pairs:
        return []
    rows = _seed_rows if panel.has_seeds else _question_rows
    found = rows(panel, pairs, n_comparisons, resamples, seed, alpha)
    shared = {
        "benchmark": panel.benchmark,
        "n": len(panel.questions.ids),
        "n_images": panel.questions.n_images,
    }
    return [
        {
            "a": panel.arms[a].id,
            "b": panel.arms[b].id,
            **shared,
            "n_seeds": [len(panel.columns[a]), len(panel.columns[b])],
            **row,
        }
        for (a, b), row in zip(pairs, found, strict=True)
    ]


def _question_rows(
    panel: Panel, pairs: Sequence[Places], n_comparisons: int, resamples: int, seed: int, alpha: float
) -> list[dict[str, Any]]:
    """One seed an arm: the questions alone are drawn."""
    scores, images = panel.scores, panel.questions.shared_clusters
    drawn = stats.resampled_means(scores, resamples, seed, images)
    p_values, p_images, tests = question_p_values(panel, pairs, n_comparisons, resamples, seed, alpha)
    rows: list[dict[str, Any]] = []
    for block in _blocks(pairs):
        first, second = np.array(block).T
        differences = scores[:, second] - scores[:, first]  # (questions, pairs of the block)
        errors = stats.standard_errors(differences, images)
        low, high = np.quantile(drawn[:, second] - drawn[:, first], [0.025, 0.975], axis=0)
        gained, lost = (differences > 0).sum(axis=0), (differences < 0).sum(axis=0)
        means = differences.mean(axis=0)
        for k in range(len(block)):
            place = len(rows)
            rows.append(
                {
                    "difference": float(means[k]),
                    "ci_low": float(low[k]),
                    "ci_high": float(high[k]),
                    "standard_error": float(errors[k]) if math.isfinite(errors[k]) else None,
                    "seed_error": None,
                    "gained": int(gained[k]),
                    "lost": int(lost[k]),
                    "test": tests[place],
                    "p_value": float(p_values[place]),
                    "p_by_image": float(p_images[place]) if p_images is not None else None,
                }
            )
    return rows


def question_p_values(
    panel: Panel, pairs: Sequence[Places], n_comparisons: int, resamples: int, seed: int, alpha: float
) -> tuple[Floats, Floats | None, list[str]]:
    """p of pairs of arms with one seed each.

    Returns:
        p of each pair; p with whole images flipped, where images have several questions; the name of each test.
    """
    images = panel.questions.shared_clusters
    soft = [place for place, (a, b) in enumerate(pairs) if not (panel.binary[a] and panel.binary[b])]
    p, p_images, tests = np.ones(len(pairs)), None, ["mcnemar_exact"] * len(pairs)
    if n_comparisons <= MOST_PERMUTED:
        # The smallest p of a permutation test is 1 / (n + 1): it must be able to pass the adjustment.
        n_flips = max(resamples, math.ceil(2 * n_comparisons / alpha))
        name = "sign_flip_permutation"
        if soft:
            own = [pairs[place] for place in soft]
            p[soft] = stats.pairwise_sign_flip_p_values(panel.scores, own, n_flips, seed)
        if images is not None:
            p_images = stats.pairwise_sign_flip_p_values(panel.scores, pairs, n_flips, seed, images)
    else:
        quick = student_p_values(panel, pairs)
        name = "student_t"
        p[soft] = quick[soft]
        p_images = quick if images is not None else None
    for place in soft:
        tests[place] = name
    for place in set(range(len(pairs))) - set(soft):
        a, b = pairs[place]
        difference = panel.scores[:, b] - panel.scores[:, a]
        p[place] = stats.mcnemar_exact(int((difference < 0).sum()), int((difference > 0).sum()))
    return p, p_images, tests


def _seed_rows(
    panel: Panel, pairs: Sequence[Places], n_comparisons: int, resamples: int, seed: int, alpha: float
) -> list[dict[str, Any]]:
    """Several seeds in some arm: seeds and questions are drawn."""
    rows = []
    for (a, b), test in zip(pairs, seed_tests(panel.seeded, pairs, resamples, seed), strict=True):
        difference = panel.means[:, b] - panel.means[:, a]
        rows.append(
            {
                "difference": test.difference,
                "ci_low": test.ci_low,
                "ci_high": test.ci_high,
                "standard_error": _finite(test.standard_error),
                "seed_error": _finite(test.seed_error),
                "gained": int((difference > 1e-12).sum()),
                "lost": int((difference < -1e-12).sum()),
                "test": "seeds_and_questions_t",
                "p_value": test.p_value,
                "p_by_image": None,  # its standard error is clustered by image already
            }
        )
    return rows


def student_p_values(panel: Panel, pairs: Sequence[Places]) -> Floats:
    """p of many pairs at once: Student's t of the differences clustered by image.

    With one seed an arm, the degrees of freedom are those of the images on which the two differ, so that few
    disagreements never look surer than an exact test finds them.
    """
    if not pairs:
        return np.empty(0)
    first, second = np.array(pairs).T
    n = len(panel.questions.ids)
    means = panel.means.mean(axis=0)
    errors, moved = _errors_of_pairs(panel, pairs)
    if panel.has_seeds:
        variances, freedom = np.array(panel.seeded.spreads()).T
        a, b = variances[first], variances[second]
        variance = errors**2 + a + b
        below = errors**4 / max(1, panel.questions.n_images - 1) + a**2 / freedom[first] + b**2 / freedom[second]
        df = np.where(below > 0, variance**2 / np.where(below > 0, below, 1.0), n)
    else:
        variance, df = errors**2, np.maximum(1.0, moved - 1.0)
    finite = np.isfinite(variance)
    # Arms that agree everywhere would be sure of anything: one disagreement is the least assumed.
    total = np.maximum(np.sqrt(np.where(finite, variance, 1.0)), 1 / n)
    p = student.two_sided_p((means[second] - means[first]) / total, np.where(finite, df, 1.0))
    return np.where(finite, p, 1.0)


def _errors_of_pairs(panel: Panel, pairs: Sequence[Places]) -> tuple[Floats, Floats]:
    """Clustered standard error of each difference, and on how many images (at least) the two differ."""
    images, scores = panel.questions.shared_clusters, panel.means
    levels = np.unique(scores)
    if len(pairs) <= _BLOCK or len(levels) > _MOST_LEVELS:
        found = [_errors_of_block(panel, block) for block in _blocks(pairs)]
        return np.concatenate([errors for errors, _ in found]), np.concatenate([moved for _, moved in found])
    # Thousands of pairs: the variance of a difference from the covariances, disagreement from counts of agreement.
    first, second = np.array(pairs).T
    n = len(scores)
    sums = stats.cluster_sums(scores - scores.mean(axis=0), images)
    covariance = sums.T @ sums / n**2
    if images is None and n > 1:
        covariance *= n / (n - 1)
    spread = np.diag(covariance)
    variance = np.maximum(0.0, spread[first] + spread[second] - 2 * covariance[first, second])
    agreeing = np.zeros((scores.shape[1], scores.shape[1]))
    for level in levels:
        has = (scores == level).astype(np.float32)
        agreeing += has.T @ has
    largest = 1 if images is None else int(np.bincount(images).max())
    moved = np.ceil((n - agreeing[first, second]) / largest)
    errors = np.sqrt(variance) if len(sums) > 1 else np.full(len(pairs), math.inf)
    return errors, moved


def _errors_of_block(panel: Panel, block: Sequence[Places]) -> tuple[Floats, Floats]:
    images = panel.questions.shared_clusters
    first, second = np.array(block).T
    differences = panel.means[:, second] - panel.means[:, first]
    has_moved = (np.abs(differences) > 1e-12).astype(np.float64)
    return stats.standard_errors(differences, images), (stats.cluster_sums(has_moved, images) > 0).sum(axis=0)


def judge(pairs: Sequence[dict[str, Any]], alpha: float) -> None:
    """Adds ``p_adjusted``, ``p_discovery`` and the ``verdict`` on b (better, worse or tied).

    p_adjusted is Holm's over all pairs; where questions share images, the larger one of both tests, so that it always
    agrees with the verdict. p_discovery is Benjamini and Hochberg's, for lists of candidates rather than claims.
    """
    plain = [pair["p_value"] for pair in pairs]
    by_image = [pair["p_value"] if pair["p_by_image"] is None else pair["p_by_image"] for pair in pairs]
    strict = np.maximum(stats.holm(plain), stats.holm(by_image))
    mild = np.maximum(stats.benjamini_hochberg(plain), stats.benjamini_hochberg(by_image))
    for pair, p, q in zip(pairs, strict, mild, strict=True):
        pair["p_adjusted"], pair["p_discovery"] = float(p), float(q)
        pair["verdict"] = ("better" if pair["difference"] > 0 else "worse") if p < alpha else "tied"


def _blocks(pairs: Sequence[Places]) -> Iterator[Sequence[Places]]:
    for first in range(0, len(pairs), _BLOCK):
        yield pairs[first : first + _BLOCK]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
