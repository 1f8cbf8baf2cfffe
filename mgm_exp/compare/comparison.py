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

- Runs that differ in their seed alone are one arm. Once some arm has several, seeds are drawn as well as questions
  (:mod:`mgm_exp.compare.seeds`). With one seed each, intervals are about other questions only: they do not say
  whether another seed would give the same models.
"""

from __future__ import annotations

import math
import statistics as stdlib_statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mgm_exp.compare import statistics as stats
from mgm_exp.compare.arm_scores import arm_rows
from mgm_exp.compare.arms import Arm, arms_of
from mgm_exp.compare.datasets import datasets
from mgm_exp.compare.differences import choices, confounded, differing_keys, environment_differences, labels
from mgm_exp.compare.groups import tied_groups
from mgm_exp.compare.pairs import Panel, judge, pair_rows, panels, wanted_pairs
from mgm_exp.compare.power import power_needed
from mgm_exp.compare.predictions import PairingError, Predictions, Progress
from mgm_exp.compare.runs import Run, is_sweep, load_runs, read_all
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
    paths: Sequence[Path | str] | Path | str,
    baseline: Path | str | None = None,
    *,
    strict: bool | None = None,
    all_pairs: bool = False,
    power: float | None = None,
    workers: int | None = 1,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Compares runs with one of them. Reads files only, writes nothing.

    Args:
        paths: Run folders, sweep folders, or both.
        baseline: The run that the others are compared with: a folder, a label, or a trial's number. None: the first
            completed one. With several seeds it stands for all of them.
        strict: Whether a pair that must not be compared is an error (else it is listed under ``refused``). None: it is,
            unless a single sweep is compared.
        all_pairs: Whether every pair is tested, and not only those with the baseline.
        power: Also say how many questions and seeds would find a true difference of so much (0.01: one point).
        workers: Processes that read predictions; None: one for each core. A script that asks for more than one must
            be importable (``if __name__ == "__main__":``), as always with processes.
        on_progress: Called with what is done, how much of it is, and how much there is.

    Returns:
        The content of ``comparison.json``; in ``pairs``, a is the baseline, and differences are b - a.

    Raises:
        UserError: a path is no run or sweep, the baseline is unknown or not completed.
        PairingError: evaluation keys or questions differ (see ``strict``); says which.
    """
    given = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if strict is None:
        strict = not (len(given) == 1 and is_sweep(given[0]))
    return compare_runs(
        load_runs(given),
        baseline,
        strict=strict,
        all_pairs=all_pairs,
        power=power,
        workers=workers,
        on_progress=on_progress,
    )


def compare_runs(
    runs: Sequence[Run],
    baseline: Path | str | None = None,
    *,
    strict: bool = False,
    all_pairs: bool = False,
    power: float | None = None,
    workers: int | None = 1,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """:func:`compare` for runs that were loaded already."""
    if not runs:
        raise UserError("There is nothing to compare: no run was given, or the sweep has no trial that ended.")
    if power is not None and not 0 < power < 1:
        power_needed([], power, ALPHA, POWER)  # refuses it before anything is read
    named = dict(zip((run.name for run in runs), labels(runs), strict=True))
    arms = arms_of(runs)
    first = _baseline(arms, named, baseline)
    read_all(runs, workers, on_progress)
    benchmarks = list(dict.fromkeys(name for run in runs if run.is_completed for name in run.benchmarks))
    found_panels, pairs, refused = _pairs(first, arms, benchmarks, strict, all_pairs) if first else ([], [], [])
    settings = [run.config for run in runs if run.config]
    has_seeds = any(len(arm.runs) > 1 for arm in arms)
    ended = [run.config for run in runs if run.config and run.is_completed]
    ended = [_seedless(config) for config in ended] if has_seeds else ended
    found, differing = _intervals(runs, benchmarks), differing_keys(settings)
    arm_of = {run.name: arm for arm in arms for run in arm.runs}
    return {
        "schema_version": SCHEMA_VERSION,
        "baseline": first.id if first else None,
        "benchmarks": benchmarks,
        "runs": [_described(run, named[run.name], arm_of[run.name].id, differing, found[run.name]) for run in runs],
        "arms": arm_rows(arms, benchmarks, found, RESAMPLES, SEED),
        "pairs": pairs,
        "groups": tied_groups(found_panels, pairs, alpha=ALPHA, resamples=RESAMPLES, seed=SEED),
        "refused": refused,
        "minimum_detectable_difference": _detectable(pairs),
        "power": None if power is None else power_needed(pairs, power, ALPHA, POWER),
        "baselines": _baselines(runs, benchmarks, named),
        "confounded": confounded(ended, choices(ended)),
        "environment": environment_differences(runs),
        "data": datasets(runs),
        "method": {
            "alpha": ALPHA,
            "power": POWER,
            "adjustment": "holm",
            "comparisons": len(pairs),
            "all_pairs": all_pairs,
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
        "runs": [{**run, "run_dir": near(run["run_dir"]), "arm": near(run["arm"])} for run in comparison["runs"]],
        "arms": [
            {**arm, "id": near(arm["id"]), "runs": [near(name) for name in arm["runs"]]} for arm in comparison["arms"]
        ],
        "groups": {
            benchmark: {
                **group,
                "letters": {near(name): letters for name, letters in group["letters"].items()},
                "best": [near(name) for name in group["best"]],
            }
            for benchmark, group in comparison["groups"].items()
        },
        "data": [{**entry, "runs": [near(name) for name in entry["runs"]]} for entry in comparison["data"]],
        "baselines": [{**row, "runs": [near(name) for name in row["runs"]]} for row in comparison["baselines"]],
        **{
            key: [{**pair, "a": near(pair["a"]), "b": near(pair["b"])} for pair in comparison[key]]
            for key in ("pairs", "refused")
        },
    }


# -- the baseline ------------------------------------------------------------------------------------------------------


def _baseline(arms: Sequence[Arm], named: Mapping[str, str], asked: Path | str | None) -> Arm | None:
    if asked is None:
        return next((arm for arm in arms if arm.completed), None)
    text = str(asked)
    found = [arm for arm in arms if text in _names(arm, named)]
    found = found or [arm for arm in arms if any(_is_folder(run, Path(text)) for run in arm.runs)]
    if len(found) != 1:
        known = ", ".join(f"{arm.label} ({arm.id})" for arm in arms)
        which = "is none of the runs" if not found else f"fits {len(found)} runs"
        raise UserError(f"The baseline {text!r} {which}; give the folder or the label of one of: {known}.")
    if not found[0].completed:
        run = found[0].runs[0]
        raise UserError(f"The baseline {text!r} cannot be compared with: it is {run.status} ({run.cause}).")
    return found[0]


def _names(arm: Arm, named: Mapping[str, str]) -> set[str]:
    """What an arm may be called: label, folder or trial number, also those of its runs."""
    names = {arm.label, arm.id}
    for run in arm.runs:
        names |= {run.name, named[run.name], run.path.name}
        if run.path.name.startswith("seed_"):
            names.add(run.path.parent.name)
    return names


def _is_folder(run: Run, folder: Path) -> bool:
    resolved = run.path.resolve()
    return folder.resolve() == resolved or (
        resolved.name.startswith("seed_") and folder.resolve() == resolved.parent and folder.is_dir()
    )


def _seedless(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "seed"}


# -- pairs -------------------------------------------------------------------------------------------------------------


def _pairs(
    first: Arm, arms: Sequence[Arm], benchmarks: Sequence[str], strict: bool, all_pairs: bool
) -> tuple[list[Panel], list[dict[str, Any]], list[dict[str, Any]]]:
    """Every other arm against the baseline (or every pair), on every benchmark both have.

    Returns:
        The panel of each benchmark that has most arms, the pairs, and what was refused.
    """
    found: list[Panel] = []
    refused: list[dict[str, Any]] = []
    plan: list[tuple[Panel, list[tuple[int, int]]]] = []
    for benchmark in benchmarks:
        own, not_compared = panels(benchmark, arms, first, strict)
        refused += not_compared
        plan += [(panel, wanted_pairs(panel, first, all_pairs)) for panel in own]
        found += [max(own, key=lambda panel: len(panel.arms))] if own else []
    n_comparisons = sum(len(wanted) for _, wanted in plan)
    pairs = [
        row
        for panel, wanted in plan
        for row in pair_rows(panel, wanted, n_comparisons=n_comparisons, resamples=RESAMPLES, seed=SEED, alpha=ALPHA)
    ]
    judge(pairs, ALPHA)
    return found, pairs, refused


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
    run: Run, label: str, arm: str, differing: Sequence[str], found: Mapping[str, tuple[float, float, int]]
) -> dict[str, Any]:
    differs = {key: run.config.get(key) for key in differing} if run.config else dict(run.params)
    trainable = run.manifest.get("trainable") or {}
    return {
        "run_dir": run.name,
        "label": label,
        "arm": arm,
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
        alike: dict[int, list[tuple[Run, Predictions]]] = {}
        for run in runs:
            if run.is_completed and benchmark in run.benchmarks:
                try:
                    predictions = run.predictions(benchmark)
                except PairingError:
                    continue  # an interval needs the questions; the value in result.json stands alone
                key = id(predictions.questions)  # what was asked is kept once for all runs that were asked it
                alike.setdefault(key, []).append((run, predictions))
        for group in alike.values():
            questions = group[0][1].questions
            types = questions.types
            scores = np.column_stack([predictions.scores for _, predictions in group])  # (questions, runs)
            kinds = np.array(types)
            parts = {f"{benchmark}/accuracy": np.ones(len(kinds), dtype=bool)}
            parts |= {f"{benchmark}/accuracy[{kind}]": kinds == kind for kind in dict.fromkeys(types)}
            for name, part in parts.items():
                low, high = accuracy_intervals(scores[part], questions.clusters[part])
                for (run, _), a, b in zip(group, low, high, strict=True):
                    found[run.name][name] = (float(a), float(b), int(part.sum()))
    return found


def accuracy_intervals(
    scores: ArrayLike, images: Sequence[Hashable] | NDArray[np.int64]
) -> tuple[stats.Floats, stats.Floats]:
    """95 % intervals of mean scores: Wilson for 0/1 scores, bootstrap over images for soft ones.

    Args:
        scores: In 0..1, (questions, runs).
        images: Image of each question: questions about one image count as dependent.

    Returns:
        Lower and upper ends, (runs,) each.
    """
    values = np.asarray(scores, dtype=np.float64)
    clusters = None if len(set(np.asarray(images).tolist())) == len(images) else images
    binary = np.isin(values, (0.0, 1.0)).all(axis=0)  # (runs,)
    low, high = np.empty(values.shape[1]), np.empty(values.shape[1])
    if not binary.all():
        low[~binary], high[~binary] = stats.bootstrap_intervals(values[:, ~binary], RESAMPLES, SEED, clusters)
    effects = np.maximum(1.0, stats.design_effects(values, clusters)) if clusters is not None else np.ones(len(low))
    for k in np.flatnonzero(binary):
        effective = len(values) / float(effects[k])
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
