"""Statistically tied groups: arms that share a letter are not told apart when every pair of arms is tested.

All pairs of all benchmarks are adjusted together by Holm, which is stricter than a comparison with the baseline alone:
an arm may be better than the baseline and still share a letter with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from mgm_exp.compare import statistics as stats
from mgm_exp.compare.pairs import Panel, question_p_values, student_p_values

_MOST_EXACT = 200
"""Pairs that are tested as the verdicts are; more are tested by Student's t, as quickly for thousands."""
MOST_ARMS = 500
"""Of more arms not all pairs are tested (10,000 have 50 million), but each with the highest; there are no letters."""
_MOST_GROUPS = 200
"""With more overlapping groups than these letters help nobody; the arms tied with the best are still named."""


def tied_groups(
    panels: Sequence[Panel], pairs: Sequence[Mapping[str, Any]], *, alpha: float, resamples: int, seed: int
) -> dict[str, Any]:
    """Letters for the arms of each benchmark.

    Args:
        panels: One for each benchmark; those of fewer than two arms are left out.
        pairs: Entries of ``pairs``, whose p-values are used where they cover all pairs of a benchmark.
        alpha: Level of all claims together.
        resamples, seed: Of permutations.

    Returns:
        benchmark -> ``letters`` (arm's id -> ``"ab"``; empty where there are too many groups), ``best`` (ids of the
        arms that the highest one is tied with, itself first), ``comparisons`` (see ``MOST_ARMS``).

    Source: Piepho 2004, "An algorithm for a letter-based representation of all-pairwise comparisons".
    """
    panels = [panel for panel in panels if len(panel.arms) > 1]
    places = [_tested(panel) for panel in panels]
    n = sum(map(len, places))
    known = {(pair["benchmark"], frozenset((pair["a"], pair["b"]))): _p(pair) for pair in pairs}
    p: list[float] = []
    for panel, own in zip(panels, places, strict=True):
        ids = [arm.id for arm in panel.arms]
        keys = [(panel.benchmark, frozenset((ids[a], ids[b]))) for a, b in own]
        if all(key in known for key in keys):
            p += [known[key] for key in keys]
        elif n <= _MOST_EXACT and not panel.has_seeds:
            alone, by_image, _ = question_p_values(panel, own, n, resamples, seed, alpha)
            p += (alone if by_image is None else np.maximum(alone, by_image)).tolist()
        else:
            p += student_p_values(panel, own).tolist()
    adjusted = stats.holm(p)
    found, done = {}, 0
    for panel, own in zip(panels, places, strict=True):
        apart = {pair for pair, one in zip(own, adjusted[done : done + len(own)], strict=True) if one < alpha}
        done += len(own)
        found[panel.benchmark] = _described(panel, apart, len(p))
    return found


def _tested(panel: Panel) -> list[tuple[int, int]]:
    """The pairs of arms that are tested, the smaller number first."""
    n = len(panel.arms)
    if n <= MOST_ARMS:
        return list(combinations(range(n), 2))
    best = int(panel.means.mean(axis=0).argmax())
    return [(min(best, arm), max(best, arm)) for arm in range(n) if arm != best]


def _p(pair: Mapping[str, Any]) -> float:
    return max(pair["p_value"], 0.0 if pair["p_by_image"] is None else pair["p_by_image"])


def _described(panel: Panel, apart: set[tuple[int, int]], comparisons: int) -> dict[str, Any]:
    means = panel.means.mean(axis=0)
    ranked = sorted(range(len(means)), key=lambda place: (-means[place], place))
    ids = [panel.arms[place].id for place in ranked]
    rank = {place: number for number, place in enumerate(ranked)}
    told_apart = {(min(rank[a], rank[b]), max(rank[a], rank[b])) for a, b in apart}
    groups = letter_groups(len(ids), told_apart) if len(ids) <= MOST_ARMS else None
    letters = {} if groups is None else {name: _letters(number, groups) for number, name in enumerate(ids)}
    best = [name for number, name in enumerate(ids) if (0, number) not in told_apart]
    return {"letters": letters, "best": best, "comparisons": comparisons}


def letter_groups(n: int, apart: set[tuple[int, int]]) -> list[set[int]] | None:
    """The fewest-member cover by largest sets without a pair that is told apart, best arms first.

    Args:
        n: Arms, numbered from the best.
        apart: Pairs (smaller number first) that are told apart.

    Returns:
        Every pair that is not in ``apart`` stands together in some group, and none that is in it does; None where
        there are too many groups.
    """
    groups = [frozenset(range(n))]
    for a, b in sorted(apart):
        split = [group for group in groups if a in group and b in group]
        if not split:
            continue
        parts = [part for group in split for part in (group - {a}, group - {b})]
        kept = [group for group in groups if not (a in group and b in group)]
        for part in sorted(set(parts), key=len, reverse=True):
            if not any(part <= other for other in kept):
                kept.append(part)
        if len(kept) > _MOST_GROUPS:
            return None
        groups = kept
    return sorted((set(group) for group in groups), key=lambda group: sorted(group))


def _letters(number: int, groups: Sequence[set[int]]) -> str:
    names = [_name(place) for place, group in enumerate(groups) if number in group]
    return "".join(names) if len(groups) <= 26 else " ".join(names)


def _name(place: int) -> str:
    """a, b, ..., z, aa, ab, ..."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return letters[place] if place < 26 else _name(place // 26 - 1) + letters[place % 26]
