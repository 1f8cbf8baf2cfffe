"""Compares finished runs with a baseline, question by question: intervals, p-values, verdicts.

    comparison = compare(["outputs/sweeps/ranks"])
    comparison["pairs"][0]["verdict"]        # "better", "worse" or "tied"

The rules, in the order in which they are applied:

- A pair is compared only if both runs answered the same questions under the same evaluation key; else it is refused.
- p: exact McNemar where all scores are 0 or 1, else a sign-flip permutation test. Where images have several questions,
  a second test flips whole images, and a verdict needs both.
- All comparisons with the baseline, over all benchmarks, are adjusted together by Holm: the chance that any of them is
  a false alarm is at most 5 %.
- Intervals of a difference are percentile bootstrap intervals over images; of one accuracy, Wilson for 0/1 scores
  (with the effective number of questions where images repeat), bootstrap over images else.

What this does not say: whether another seed would give the same models. Intervals are about other questions.
"""

from __future__ import annotations

import math
import statistics as stdlib_statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mgm_exp.compare import statistics as stats
from mgm_exp.compare.datasets import datasets
from mgm_exp.compare.differences import choices, confounded, differing_keys, environment_differences, labels
from mgm_exp.compare.runs import PairingError, Predictions, Run, check_pair, is_sweep, load_runs
from mgm_exp.errors import UserError
from mgm_exp.store import write_json_atomic

SCHEMA_VERSION = 1
ALPHA = 0.05
POWER = 0.8
RESAMPLES = 10_000
SEED = 0
BASELINES = {
    "question_only": "question only",
    "base": "untouched base",
    "aligned": "aligned only",
}
"""Metrics ``<benchmark>/baseline_<key>`` of a run, and what they are called."""


def compare(
    paths: Sequence[Path | str] | Path | str, baseline: Path | str | None = None, *, strict: bool | None = None
) -> dict[str, Any]:
    """Compares runs with one of them. Reads files only, writes nothing.

    Args:
        paths: Run folders, sweep folders, or both.
        baseline: The run that the others are compared with: a folder, a label, or a trial's number. None: the first
            completed one.
        strict: Whether a pair that must not be compared is an error (else it is listed under ``refused``). None: it is,
            unless a single sweep is compared.

    Returns:
        The content of ``comparison.json``; in ``pairs``, a is the baseline, and differences are b - a.

    Raises:
        UserError: a path is no run or sweep, the baseline is unknown or not completed.
        PairingError: evaluation keys or questions differ (see ``strict``); says which.
    """
    given = [paths] if isinstance(paths, (str, Path)) else list(paths)
    runs = load_runs(given)
    if not runs:
        raise UserError("There is nothing to compare: no run was given, or the sweep has no trial that ended.")
    if strict is None:
        strict = not (len(given) == 1 and is_sweep(given[0]))
    named = dict(zip((run.name for run in runs), labels(runs), strict=True))
    first = _baseline(runs, named, baseline)
    benchmarks = list(dict.fromkeys(name for run in runs if run.is_completed for name in run.benchmarks))
    pairs, refused = _pairs(first, runs, benchmarks, strict) if first else ([], [])
    settings = [run.config for run in runs if run.config]
    ended = [run.config for run in runs if run.config and run.is_completed]
    found = _intervals(runs, benchmarks)
    return {
        "schema_version": SCHEMA_VERSION,
        "baseline": first.name if first else None,
        "benchmarks": benchmarks,
        "runs": [_described(run, named[run.name], differing_keys(settings), found[run.name]) for run in runs],
        "pairs": pairs,
        "refused": refused,
        "minimum_detectable_difference": _detectable(pairs),
        "baselines": _baselines(runs, benchmarks, named),
        "confounded": confounded(ended, choices(ended)),
        "environment": environment_differences(runs),
        "data": datasets(runs),
        "method": {
            "alpha": ALPHA,
            "power": POWER,
            "adjustment": "holm",
            "comparisons": len(pairs),
            "resamples": RESAMPLES,
            "seed": SEED,
        },
    }


def write_comparison(comparison: Mapping[str, Any], path: Path | str) -> Path:
    """Writes ``comparison.json``; run folders below it are named relative to it, so that both can be moved together.

    Args:
        comparison: What :func:`compare` returned.
        path: The file, or the folder it goes into.
    """
    target = Path(path)
    if target.is_dir():
        target = target / "comparison.json"
    write_json_atomic(target, _relative_to(comparison, target.parent.resolve()))
    return target


def _relative_to(comparison: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    def near(name: str | None) -> str | None:
        if name is None:
            return None
        path = Path(name).resolve()
        return str(path.relative_to(folder)) if folder in path.parents else name

    return {
        **comparison,
        "baseline": near(comparison["baseline"]),
        "runs": [{**run, "run_dir": near(run["run_dir"])} for run in comparison["runs"]],
        "data": [{**entry, "runs": [near(name) for name in entry["runs"]]} for entry in comparison["data"]],
        **{
            key: [{**pair, "a": near(pair["a"]), "b": near(pair["b"])} for pair in comparison[key]]
            for key in ("pairs", "refused")
        },
    }


# -- the baseline ------------------------------------------------------------------------------------------------------


def _baseline(runs: Sequence[Run], named: Mapping[str, str], asked: Path | str | None) -> Run | None:
    if asked is None:
        return next((run for run in runs if run.is_completed), None)
    text = str(asked)
    found = [run for run in runs if text in (run.name, named[run.name], run.path.name)]
    found = found or [run for run in runs if run.path.resolve() == Path(text).resolve()]
    if len(found) != 1:
        known = ", ".join(f"{named[run.name]} ({run.name})" for run in runs)
        which = "is none of the runs" if not found else f"fits {len(found)} runs"
        raise UserError(f"The baseline {text!r} {which}; give the folder or the label of one of: {known}.")
    if not found[0].is_completed:
        raise UserError(f"The baseline {text!r} cannot be compared with: it is {found[0].status} ({found[0].cause}).")
    return found[0]


# -- pairs -------------------------------------------------------------------------------------------------------------


def _pairs(
    first: Run, runs: Sequence[Run], benchmarks: Sequence[str], strict: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Every other completed run against the baseline, on every benchmark both have."""
    pairs: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    others = [run for run in runs if run.is_completed and run is not first]
    n_comparisons = len(others) * len(benchmarks)
    for benchmark in benchmarks:
        candidates = []
        for run in others:
            if benchmark not in first.benchmarks or benchmark not in run.benchmarks:
                continue
            try:
                candidates.append((run, *check_pair(first, run, benchmark)))
            except PairingError as error:
                if strict:
                    raise
                refused.append({"a": first.name, "b": run.name, "benchmark": benchmark, "reason": str(error)})
        if candidates:
            scored = paired_tests(candidates[0][1], [right for _, _, right in candidates], n_comparisons)
            for (run, _, _), row in zip(candidates, scored, strict=True):
                pairs.append({"a": first.name, "b": run.name, "benchmark": benchmark, **row})
    judge(pairs)
    return pairs, refused


def paired_tests(base: Predictions, candidates: Sequence[Predictions], n_comparisons: int) -> list[dict[str, Any]]:
    """Difference, interval and p of every candidate against a baseline; all share the resamples of the questions.

    Args:
        base: The baseline's scores.
        candidates: Scores on the same questions in the same order.
        n_comparisons: How many comparisons will be adjusted together.

    Returns:
        The keys of ``pairs`` in ``comparison.json`` from ``n`` to ``p_value``, a row for each candidate.
    """
    differences = np.column_stack([candidate.scores - base.scores for candidate in candidates])
    images = base.images if base.has_shared_images else None
    low, high = stats.bootstrap_intervals(differences, RESAMPLES, SEED, images)
    # The smallest p of a permutation test is 1 / (n + 1): it must be able to pass the adjustment.
    n_flips = max(RESAMPLES, math.ceil(2 * n_comparisons / ALPHA))
    p_soft = stats.sign_flip_p_values(differences, n_flips, SEED)
    p_images = stats.sign_flip_p_values(differences, n_flips, SEED, images) if images else None
    rows = []
    for k, candidate in enumerate(candidates):
        estimate = stats.paired_difference(base.scores, candidate.scores, images)
        is_binary = base.is_binary and candidate.is_binary
        gained = int((differences[:, k] > 0).sum())
        lost = int((differences[:, k] < 0).sum())
        rows.append(
            {
                "n": len(base.ids),
                "n_images": len(set(base.images)),
                "difference": estimate.difference,
                "ci_low": float(low[k]),
                "ci_high": float(high[k]),
                "standard_error": _finite(estimate.standard_error),
                "gained": gained,
                "lost": lost,
                "test": "mcnemar_exact" if is_binary else "sign_flip_permutation",
                "p_value": stats.mcnemar_exact(lost, gained) if is_binary else float(p_soft[k]),
                "p_by_image": float(p_images[k]) if p_images is not None else None,
            }
        )
    return rows


def judge(pairs: Sequence[dict[str, Any]]) -> None:
    """Adds ``p_adjusted`` and the ``verdict`` on b (better, worse or tied).

    p_adjusted is Holm's over all pairs; where questions share images, the larger one of both tests, so that it always
    agrees with the verdict.
    """
    adjusted = stats.holm([pair["p_value"] for pair in pairs])
    by_image = stats.holm([pair["p_value"] if pair["p_by_image"] is None else pair["p_by_image"] for pair in pairs])
    for pair, p, p_image in zip(pairs, adjusted, by_image, strict=True):
        pair["p_adjusted"] = p if pair["p_by_image"] is None else max(p, p_image)
        is_sure = pair["p_adjusted"] < ALPHA
        pair["verdict"] = ("better" if pair["difference"] > 0 else "worse") if is_sure else "tied"


def _detectable(pairs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """For each benchmark: the smallest true difference found with probability POWER, at the strictest step of Holm."""
    found = {}
    for benchmark in dict.fromkeys(pair["benchmark"] for pair in pairs):
        # Two runs that agree everywhere would promise to find anything: one disagreement is the least assumed.
        errors = [max(pair["standard_error"] or 0.0, 1 / pair["n"]) for pair in pairs if pair["benchmark"] == benchmark]
        found[benchmark] = stats.minimum_detectable_difference(
            stdlib_statistics.median(errors), ALPHA / len(pairs), POWER
        )
    return found


# -- runs --------------------------------------------------------------------------------------------------------------


def _described(
    run: Run, label: str, differing: Sequence[str], found: Mapping[str, tuple[float, float, int]]
) -> dict[str, Any]:
    differs = {key: run.config.get(key) for key in differing} if run.config else dict(run.params)
    trainable = run.manifest.get("trainable") or {}
    return {
        "run_dir": run.name,
        "label": label,
        "status": run.status,
        "cause": run.cause or None,
        "advice": (run.result.get("error") or {}).get("advice"),
        "differs": differs,
        "params": dict(run.params),
        "seeds": [] if run.seed is None else [run.seed],
        "metrics": _metrics(run, found),
        "trainable": {key: trainable.get(key) for key in ("n_lora", "n_other", "n_total")},
        "train_tokens_per_s": _finite(run.result.get("train_tokens_per_s")),
        "peak_memory_gib": _finite(run.result.get("peak_memory_gib")),
        "wall_s": _finite(run.result.get("wall_s")),
    }


def _metrics(run: Run, found: Mapping[str, tuple[float, float, int]]) -> dict[str, dict[str, Any]]:
    """Every metric of a run; accuracies with interval and number of questions."""
    metrics: dict[str, dict[str, Any]] = {}
    for name, value in run.metrics.items():
        metrics[name] = {"value": value, "ci_low": None, "ci_high": None, "n": None}
        benchmark, _, kind = name.partition("/baseline_")
        n = (run.eval_keys.get(benchmark) or {}).get("n") if kind else None
        if name in found:
            low, high, n = found[name]
            metrics[name] |= {"ci_low": low, "ci_high": high, "n": n}
        elif n:
            metrics[name] |= _rate_interval(value, n)
    return metrics


def _intervals(runs: Sequence[Run], benchmarks: Sequence[str]) -> dict[str, dict[str, tuple[float, float, int]]]:
    """(low, high, n) of ``<benchmark>/accuracy`` and of each question type: run name -> metric -> interval.

    Runs that answered the same questions share the resamples, which makes 200 runs as cheap as a few.
    """
    found: dict[str, dict[str, tuple[float, float, int]]] = {run.name: {} for run in runs}
    for benchmark in benchmarks:
        alike: dict[tuple[Any, ...], list[tuple[Run, Predictions]]] = {}
        for run in runs:
            if run.is_completed and benchmark in run.benchmarks:
                try:
                    predictions = run.predictions(benchmark)
                except PairingError:
                    continue  # an interval needs the questions; the value in result.json stands alone
                key = (predictions.images, predictions.types)
                alike.setdefault(key, []).append((run, predictions))
        for (images, types), group in alike.items():
            scores = np.column_stack([predictions.scores for _, predictions in group])  # (questions, runs)
            kinds = np.array(types)
            parts = {f"{benchmark}/accuracy": np.ones(len(kinds), dtype=bool)}
            parts |= {f"{benchmark}/accuracy[{kind}]": kinds == kind for kind in dict.fromkeys(types)}
            for name, part in parts.items():
                low, high = accuracy_intervals(scores[part], np.array(images, dtype=object)[part].tolist())
                for (run, _), a, b in zip(group, low, high, strict=True):
                    found[run.name][name] = (float(a), float(b), int(part.sum()))
    return found


def accuracy_intervals(scores: ArrayLike, images: Sequence[str]) -> tuple[stats.Floats, stats.Floats]:
    """95 % intervals of mean scores: Wilson for 0/1 scores, bootstrap over images for soft ones.

    Args:
        scores: In 0..1, (questions, runs).
        images: Image of each question: questions about one image count as dependent.

    Returns:
        Lower and upper ends, (runs,) each.
    """
    values = np.asarray(scores, dtype=np.float64)
    clusters = images if len(set(images)) < len(images) else None
    binary = np.isin(values, (0.0, 1.0)).all(axis=0)  # (runs,)
    low, high = np.empty(values.shape[1]), np.empty(values.shape[1])
    if not binary.all():
        low[~binary], high[~binary] = stats.bootstrap_intervals(values[:, ~binary], RESAMPLES, SEED, clusters)
    for k in np.flatnonzero(binary):
        effect = max(1.0, stats.design_effect(values[:, k], clusters)) if clusters else 1.0
        effective = len(values) / effect
        low[k], high[k] = stats.wilson_interval(min(1.0, float(values[:, k].mean())) * effective, effective)
    return low, high


def _rate_interval(value: float, n: int) -> dict[str, Any]:
    """Wilson interval of a mean score whose single scores are not at hand: rather wide, as soft scores vary less."""
    low, high = stats.wilson_interval(min(max(value, 0.0), 1.0) * n, n)
    return {"ci_low": low, "ci_high": high, "n": n}


def _baselines(runs: Sequence[Run], benchmarks: Sequence[str], named: Mapping[str, str]) -> list[dict[str, Any]]:
    """Question-only, base and aligned-only scores; one row for runs that share the value."""
    rows = []
    for benchmark in benchmarks:
        for kind, what in BASELINES.items():
            name = f"{benchmark}/baseline_{kind}"
            groups: dict[float, list[Run]] = {}
            for run in runs:
                if run.is_completed and name in run.metrics:
                    groups.setdefault(run.metrics[name], []).append(run)
            for value, sharing in groups.items():
                n = (sharing[0].eval_keys.get(benchmark) or {}).get("n")
                of = "" if len(groups) == 1 else f", {_common(named[run.name] for run in sharing)}"
                rows.append(
                    {
                        "benchmark": benchmark,
                        "name": kind,
                        "label": f"{what}{of}",
                        "value": value,
                        **(_rate_interval(value, n) if n else {"ci_low": None, "ci_high": None, "n": None}),
                        "runs": [run.name for run in sharing],
                    }
                )
    return rows


def _common(names: Iterable[str]) -> str:
    """The words that all labels share, or all labels."""
    split = [name.split() for name in names]
    shared = [word for word in split[0] if all(word in other for other in split[1:])]
    return " ".join(shared) or " / ".join(" ".join(words) for words in split)


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
