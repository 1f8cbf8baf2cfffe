"""How many questions or seeds it would take to find a difference of a given size, from what was measured.

The number of questions follows Miller 2024 (arXiv 2411.00640, section 5), with the variance of the paired differences
between images that these runs show. The number of seeds is what brings the standard error down far enough once the
variance between questions is there; where that alone is too much, no number of seeds helps.
"""

from __future__ import annotations

import math
import statistics as stdlib_statistics
from collections.abc import Mapping, Sequence
from typing import Any

from mgm_exp.compare.statistics import minimum_detectable_difference, questions_needed
from mgm_exp.errors import UserError

_MOST_SEEDS = 1_000


def power_needed(pairs: Sequence[Mapping[str, Any]], delta: float, alpha: float, power: float) -> dict[str, Any]:
    """What each benchmark would need.

    Args:
        pairs: Entries of ``pairs``.
        delta: The true difference that should be found, 0.01 for one point.
        alpha: Level of the verdicts.
        power: Probability of finding it.

    Returns:
        ``difference, alpha, power, benchmarks{name: {n, standard_error, seed_sd, questions, questions_adjusted, seeds,
        seeds_adjusted, found_with_probability}}``: ``questions`` for one comparison, ``questions_adjusted`` at the
        strictest step of Holm's adjustment; ``seeds`` of each arm with the questions that are there: None where no
        number is enough, or where no arm has several seeds.

    Raises:
        UserError: delta is not a difference of scores.
    """
    if not 0 < delta < 1:
        raise UserError(
            f"--power {delta:g} must lie between 0 and 1: it is a difference of accuracies, 0.01 for one point."
        )
    strictest = alpha / max(1, len(pairs))
    found = {}
    for benchmark in dict.fromkeys(pair["benchmark"] for pair in pairs):
        own = [pair for pair in pairs if pair["benchmark"] == benchmark]
        found[benchmark] = _needed(own, delta, alpha, strictest, power)
    return {"difference": delta, "alpha": alpha, "power": power, "comparisons": len(pairs), "benchmarks": found}


def _needed(
    pairs: Sequence[Mapping[str, Any]], delta: float, alpha: float, strictest: float, power: float
) -> dict[str, Any]:
    n = pairs[0]["n"]
    # Two runs that agree everywhere would promise to find anything: one disagreement is the least assumed.
    total = stdlib_statistics.median(max(pair["standard_error"] or 0.0, 1 / n) for pair in pairs)
    seeds = _seed_variances(pairs)
    between_seeds = stdlib_statistics.median(seeds) if seeds else None
    of_questions = stdlib_statistics.median(_question_variance(pair) for pair in pairs)
    return {
        "n": n,
        "standard_error": total,
        "seed_sd": None if between_seeds is None else math.sqrt(between_seeds),
        "questions": math.ceil(questions_needed(delta, of_questions * n, alpha=alpha, power=power)),
        "questions_adjusted": math.ceil(questions_needed(delta, of_questions * n, alpha=strictest, power=power)),
        "seeds": _seeds(delta, of_questions, between_seeds, alpha, power),
        "seeds_adjusted": _seeds(delta, of_questions, between_seeds, strictest, power),
        "detectable": minimum_detectable_difference(total, strictest, power),
    }


def _question_variance(pair: Mapping[str, Any]) -> float:
    """Variance of the difference over other questions alone."""
    total, seeds = pair["standard_error"] or 0.0, pair["seed_error"] or 0.0
    return max(total**2 - seeds**2, 1 / pair["n"] ** 2)


def _seed_variances(pairs: Sequence[Mapping[str, Any]]) -> list[float]:
    """Variance between seeds of one arm, as each pair shows it."""
    return [
        pair["seed_error"] ** 2 / (1 / pair["n_seeds"][0] + 1 / pair["n_seeds"][1])
        for pair in pairs
        if pair["seed_error"] is not None
    ]


def _seeds(delta: float, of_questions: float, between_seeds: float | None, alpha: float, power: float) -> int | None:
    if between_seeds is None:
        return None
    wanted = (delta / minimum_detectable_difference(1.0, alpha, power)) ** 2 - of_questions
    if wanted <= 0:
        return None
    seeds = max(1, math.ceil(2 * between_seeds / wanted))
    return seeds if seeds <= _MOST_SEEDS else None


def power_lines(needed: Mapping[str, Any]) -> list[str]:
    """The same in words, a sentence or two for each benchmark."""
    points = f"{100 * needed['difference']:g} point{'' if needed['difference'] == 0.01 else 's'}"
    said = []
    if not needed["benchmarks"]:
        return ["Nothing was compared, so nothing can be said about how much data is needed."]
    for benchmark, one in needed["benchmarks"].items():
        line = (
            f"{benchmark}: to find a true difference of {points} with probability {needed['power']:.0%}, "
            f"{one['questions']:,} questions are needed for one comparison"
        )
        if needed["comparisons"] > 1:
            line += f", {one['questions_adjusted']:,} for the strictest of {needed['comparisons']}"
        said.append(f"{line}; there are {one['n']:,}")
        said.append(f"{benchmark}: {_about_seeds(one, needed['comparisons'])}")
    return said


def _about_seeds(one: Mapping[str, Any], comparisons: int) -> str:
    if one["seed_sd"] is None:
        return "how many seeds cannot be said, since no configuration was run with several"
    sd = f"accuracies of seeds spread by {100 * one['seed_sd']:.1f} points (standard deviation)"
    if one["seeds"] is None:
        return f"{sd}; with so few questions no number of seeds is enough"
    strict = ""
    if comparisons > 1:
        enough = "no number is enough" if one["seeds_adjusted"] is None else f"{one['seeds_adjusted']:,}"
        strict = f", for the strictest of {comparisons} {enough}"
    return (
        f"{sd}; with these questions {one['seeds']:,} seed{'' if one['seeds'] == 1 else 's'} an arm are enough{strict}"
    )
