"""The accuracies of each arm: over its seeds and questions, with the spread between seeds beside that of questions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mgm_exp.compare import statistics as stats
from mgm_exp.compare.arms import Arm
from mgm_exp.compare.predictions import PairingError, Predictions
from mgm_exp.compare.runs import Run
from mgm_exp.compare.seeds import Seeded, arm_intervals

_IQM_RESAMPLES = 2_000

Intervals = Mapping[str, Mapping[str, tuple[float, float, int]]]


def arm_rows(
    arms: Sequence[Arm], benchmarks: Sequence[str], found: Intervals, resamples: int, seed: int
) -> list[dict[str, Any]]:
    """Entries of ``arms`` in ``comparison.json``.

    Args:
        arms: The arms.
        benchmarks: All benchmarks.
        found: Interval of each accuracy of each run: run -> metric -> (low, high, n).
        resamples: Of the bootstrap.
        seed: Of everything random.
    """
    return [
        {
            "id": arm.id,
            "label": arm.label,
            "runs": [run.name for run in arm.runs],
            "seeds": [run.seed for run in arm.completed if run.seed is not None],
            "status": arm.status,
            "metrics": _metrics(arm, benchmarks, found, resamples, seed),
            "iqm": _iqm(arm, seed),
        }
        for arm in arms
    ]


def _metrics(
    arm: Arm, benchmarks: Sequence[str], found: Intervals, resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Every metric that some completed run has: the mean over those that have it."""
    values: dict[str, list[tuple[Run, float]]] = {}
    for run in arm.completed:
        for name, value in run.metrics.items():
            values.setdefault(name, []).append((run, value))
    metrics: dict[str, dict[str, Any]] = {}
    for name, own in values.items():
        numbers = [value for _, value in own]
        metrics[name] = {
            "value": float(np.mean(numbers)),
            "ci_low": None,
            "ci_high": None,
            "n": None,
            "n_seeds": len(own),
            "seed_sd": float(np.std(numbers, ddof=1)) if len(own) > 1 else None,
            "standard_error": None,
        }
        if len(own) == 1 and name in found[own[0][0].name]:
            low, high, n = found[own[0][0].name][name]
            metrics[name] |= {"ci_low": low, "ci_high": high, "n": n}
    for benchmark in benchmarks:
        for name, interval in _question_intervals(arm, benchmark, resamples, seed).items():
            if name in metrics:
                metrics[name] |= interval
    return metrics


def _question_intervals(arm: Arm, benchmark: str, resamples: int, seed: int) -> dict[str, dict[str, Any]]:
    """Standard errors of the accuracy and of each question type's; with several seeds, intervals over both."""
    read = [_predictions(run, benchmark) for run in arm.completed if benchmark in run.benchmarks]
    whole = [one for one in read if one is not None]
    if not whole or any(one.questions is not whole[0].questions for one in whole):
        return {}
    questions = whole[0].questions
    scores = np.column_stack([one.scores for one in whole])  # (questions, seeds)
    kinds = np.array(questions.types)
    parts = {f"{benchmark}/accuracy": np.ones(len(kinds), dtype=bool)}
    if len(whole) > 1:
        parts |= {f"{benchmark}/accuracy[{kind}]": kinds == kind for kind in dict.fromkeys(questions.types)}
    intervals = {}
    for name, part in parts.items():
        images = questions.clusters[part]
        clusters = None if len(set(images.tolist())) == len(images) else _renumbered(images)
        error = float(stats.standard_errors(scores[part].mean(axis=1)[:, None], clusters)[0])
        intervals[name] = {"n": int(part.sum()), "standard_error": error if math.isfinite(error) else None}
        if len(whole) > 1:
            columns = [list(range(len(whole)))]
            (test,) = arm_intervals(Seeded(scores[part], columns, clusters), resamples, seed)
            intervals[name] |= {"ci_low": test.ci_low, "ci_high": test.ci_high}
    return intervals


def _renumbered(clusters: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.unique(clusters, return_inverse=True)[1].astype(np.int64)


def _predictions(run: Run, benchmark: str) -> Predictions | None:
    try:
        return run.predictions(benchmark)
    except PairingError:
        return None  # said under ``refused``; the value in result.json stands alone


def _iqm(arm: Arm, seed: int) -> dict[str, Any] | None:
    """Interquartile mean over seeds and benchmarks, where there are several seeds with the same benchmarks."""
    runs = arm.completed
    if len(runs) < 2 or any(run.benchmarks != runs[0].benchmarks or not run.benchmarks for run in runs):
        return None
    scores = np.array([[run.metrics[f"{name}/accuracy"] for name in run.benchmarks] for run in runs])
    low, high = stats.stratified_bootstrap(scores, stats.interquartile_mean, _IQM_RESAMPLES, seed)
    return {
        "value": stats.interquartile_mean(scores),
        "ci_low": low,
        "ci_high": high,
        "n_seeds": len(runs),
        "benchmarks": list(runs[0].benchmarks),
    }
