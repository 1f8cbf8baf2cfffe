"""The comparison in words and formatted numbers, the same for every way of showing it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mgm_exp.compare.differences import shown
from mgm_exp.compare.power import power_lines

Comparison = Mapping[str, Any]

_MOST_SENTENCES = 3
"""Pairs that get a sentence each; more are counted in one."""
_MOST_VALUES = 6
"""Values of a setting that are named."""
_FEW_IMAGES = 30
"""With fewer clusters a bootstrap interval does not hold what it promises."""
_PHRASES = {"better": "is better than", "worse": "is worse than"}
_ENDED = {
    "failed": "failed",
    "interrupted": "was interrupted",
    "paused": "waits at its rung",
    "pruned": "was pruned",
    "running": "is still running",
}
_BASELINES = (
    "question only: the most frequent training answer to the same words, no image seen; untouched base: before any "
    "training; aligned only: after the align stage"
)


# -- numbers -----------------------------------------------------------------------------------------------------------


def percent(rate: float) -> str:
    """0.6123 -> ``61.2``."""
    return f"{100 * rate:.1f}"


def signed(difference: float) -> str:
    """0.012 -> ``+1.2``; what rounds to zero has no sign."""
    text = f"{100 * difference:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def metric(run: Mapping[str, Any], benchmark: str | None) -> Mapping[str, Any] | None:
    """Accuracy of a run on a benchmark, with its interval."""
    found: Mapping[str, Any] | None = run["metrics"].get(f"{benchmark}/accuracy")
    return found


def rate_interval(found: Mapping[str, Any] | None) -> str:
    """``61.2 [57.1, 65.0]``, in percent."""
    if found is None:
        return "-"
    if found["ci_low"] is None:
        return percent(found["value"])
    return f"{percent(found['value'])} [{percent(found['ci_low'])}, {percent(found['ci_high'])}]"


def points_interval(pair: Mapping[str, Any]) -> str:
    """``+1.2 [-2.1, +4.5]``, in points."""
    return f"{signed(pair['difference'])} [{signed(pair['ci_low'])}, {signed(pair['ci_high'])}]"


def count(number: float | None) -> str:
    """A number in thousands, millions or billions: ``75.8 k``, ``19.6 M``."""
    if number is None:
        return "-"
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if number >= size:
            return f"{number / (1e3 if unit == ' k' else size):.1f}{unit}"
    return f"{number:,.0f}"


def trained(trainable: Mapping[str, int | None]) -> str:
    """Trained parameters; those outside of the adapter are shown beside it, because they may well be more."""
    lora, other = trainable.get("n_lora"), trainable.get("n_other")
    if lora and other:
        return f"{count(lora)} + {count(other)}"
    return count(trainable.get("n_total") or None)


def short_folders(folders: Sequence[str]) -> tuple[str, list[str]]:
    """The folder that all share, and each folder below it."""
    parts = [Path(folder).parts for folder in folders]
    shared = 0
    while all(len(p) > shared + 1 and p[: shared + 1] == parts[0][: shared + 1] for p in parts):
        shared += 1
    return str(Path(*parts[0][:shared])) if shared else "", [str(Path(*p[shared:])) for p in parts]


def p_text(p: float) -> str:
    """``p = 0.012``, ``p < 0.001``."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def names_of(comparison: Comparison) -> dict[str, str]:
    """Label of each run and each arm by its folder; an arm of several runs goes by the label of the arm."""
    names = {run["run_dir"]: run["label"] for run in comparison["runs"]}
    return names | {arm["id"]: arm["label"] for arm in comparison["arms"]}


# -- sentences ---------------------------------------------------------------------------------------------------------


def verdict_lines(comparison: Comparison) -> list[str]:
    """The result in a sentence or a few."""
    names = names_of(comparison)
    pairs = comparison["pairs"]
    if not pairs:
        return [_nothing_compared(comparison, names)]
    if len(pairs) <= _MOST_SENTENCES:
        return [_sentence(pair, names) for pair in pairs]
    said = [_summary(comparison, benchmark, names) for benchmark in comparison["benchmarks"]]
    return said + [line for benchmark in comparison["benchmarks"] for line in _best(comparison, benchmark, names)]


def _nothing_compared(comparison: Comparison, names: Mapping[str, str]) -> str:
    runs = comparison["runs"]
    done = [arm for arm in comparison["arms"] if arm["status"] == "completed"]
    if not done:
        return f"None of {len(runs)} runs is completed: there is no result to compare yet."
    if len(done) == 1:
        return f"Only {done[0]['label']} is completed: there is nothing to compare it with yet."
    if comparison["refused"]:
        return f"No run can be compared with {names[comparison['baseline']]}: {comparison['refused'][0]['reason']}"
    return f"No benchmark was run by both {names[comparison['baseline']]} and another run."


def _sentence(pair: Mapping[str, Any], names: Mapping[str, str]) -> str:
    a, b = names[pair["a"]], names[pair["b"]]
    said = (
        f"{b} {_PHRASES[pair['verdict']]} {a}" if pair["verdict"] in _PHRASES else f"{b} and {a} are statistically tied"
    )
    unit = "point" if abs(round(100 * pair["difference"], 1)) == 1 else "points"
    return (
        f"{said} on {pair['benchmark']}: {signed(pair['difference'])} {unit}, 95 % interval "
        f"{signed(pair['ci_low'])} to {signed(pair['ci_high'])}, adjusted {p_text(pair['p_adjusted'])}, n={pair['n']:,}"
        f"{_seeds(pair)}"
    )


def _seeds(pair: Mapping[str, Any]) -> str:
    a, b = pair["n_seeds"]
    if a == b == 1:
        return ""
    return f", {a} seeds each" if a == b else f", {b} and {a} seeds"


def _summary(comparison: Comparison, benchmark: str, names: Mapping[str, str]) -> str:
    """Many runs on one benchmark: how many of each verdict, and the largest difference."""
    pairs = [
        pair for pair in comparison["pairs"] if pair["benchmark"] == benchmark and pair["a"] == comparison["baseline"]
    ]
    if not pairs:
        return f"On {benchmark} no run can be compared with {names[comparison['baseline']]}."
    counted = {verdict: sum(pair["verdict"] == verdict for pair in pairs) for verdict in ("better", "tied", "worse")}
    said = f"{counted['better']} better, {counted['tied']} statistically tied, {counted['worse']} worse"
    top = max(pairs, key=lambda pair: pair["difference"])
    best = f"; highest: {names[top['b']]}, {points_interval(top)} points ({top['verdict']})"
    if top["difference"] <= 0:
        best = "; none is higher than it"
    what = "arms" if any(len(arm["runs"]) > 1 for arm in comparison["arms"]) else "runs"
    return f"On {benchmark}, {len(pairs)} {what} against {names[comparison['baseline']]}: {said}{best}"


def _best(comparison: Comparison, benchmark: str, names: Mapping[str, str]) -> list[str]:
    """The highest of all and how many cannot be told apart from it; nothing where all are tied."""
    group = comparison["groups"].get(benchmark)
    if group is None or not any(pair["verdict"] != "tied" for pair in comparison["pairs"]):
        return []
    top, *tied = group["best"]
    # The comparison with the baseline is the surer one, being one of fewer.
    better = {
        (pair["a"], pair["b"])
        for pair in comparison["pairs"]
        if pair["verdict"] == "better" and pair["benchmark"] == benchmark
    }
    tied = [name for name in tied if (name, top) not in better]
    if not tied:
        return [f"On {benchmark}, {names[top]} is the highest, and every other one is told apart from it"]
    few = ", ".join(names[name] for name in tied[:_MOST_SENTENCES])
    more = f" and {len(tied) - _MOST_SENTENCES} more" if len(tied) > _MOST_SENTENCES else ""
    return [f"On {benchmark}, {names[top]} is the highest; not told apart from it: {few}{more}"]


def notes(comparison: Comparison) -> list[str]:
    """What a reader must know beside the numbers, a sentence each."""
    names = names_of(comparison)
    own_names = {run["run_dir"]: run["label"] for run in comparison["runs"]}
    method = comparison["method"]
    said = []
    for run in comparison["runs"]:
        if run["status"] != "completed":
            why = run["cause"] or "no cause was recorded"
            ended = _ENDED.get(run["status"], f"is {run['status']}")
            said.append(f"{own_names[run['run_dir']]} {ended}: {why.rstrip('.')}{_advice(run)}")
    said += [f"Not compared: {refused['reason']}" for refused in comparison["refused"]]
    for key, follows in comparison["confounded"].items():
        values = [shown(run["differs"].get(key)) for run in comparison["runs"] if run["status"] == "completed"]
        what = _some(list(dict.fromkeys(values)))
        said.append(f"{key} ({what}) changes together with {' and '.join(follows)}: the two cannot be told apart")
    for key, values in comparison["environment"].items():
        said.append(f"Not the same for all runs: {key} ({', '.join(values)})")
    if any(run["trainable"].get("n_lora") and run["trainable"].get("n_other") for run in comparison["runs"]):
        said.append("trained: parameters of the adapter + those of what trains beside it (the connector)")
    if comparison["pairs"]:
        smallest = ", ".join(
            f"{percent(value)} points on {benchmark}"
            for benchmark, value in comparison["minimum_detectable_difference"].items()
        )
        said.append(
            f"Baseline: {names[comparison['baseline']]}. Differences are paired by question; verdicts at "
            f"{method['alpha']:.0%} after Holm's adjustment for {method['comparisons']} comparison"
            f"{'s' if method['comparisons'] != 1 else ''}{' (all pairs)' if method['all_pairs'] else ''}; a true "
            f"difference of {smallest} is found with probability {method['power']:.0%}"
        )
        said += _about_groups(comparison)
        said += _about_images(comparison["pairs"])
        if comparison["baselines"]:
            said.append(_BASELINES)
        said += _about_seeds(comparison, names)
    if comparison["power"] is not None:
        said += power_lines(comparison["power"])
    return said


def has_groups(comparison: Comparison, benchmark: str | None) -> bool:
    """Whether letters say more than the verdicts do: with three arms or more."""
    return len((comparison["groups"].get(benchmark) or {}).get("letters", {})) > 2


def _about_groups(comparison: Comparison) -> list[str]:
    shown_groups = [benchmark for benchmark in comparison["benchmarks"] if has_groups(comparison, benchmark)]
    if not shown_groups:
        return []
    n = comparison["groups"][shown_groups[0]]["comparisons"]
    return [
        f"Letters: those that share one are not told apart when each is compared with each ({n} comparisons, Holm), "
        "which takes more than being told apart from the baseline"
    ]


def _about_seeds(comparison: Comparison, names: Mapping[str, str]) -> list[str]:
    several = [arm for arm in comparison["arms"] if len(arm["seeds"]) > 1]
    if not several:
        return ["Intervals are about other questions of the same kind; another seed may train another model"]
    said = []
    for benchmark in comparison["benchmarks"]:
        found = [(arm, arm["metrics"].get(f"{benchmark}/accuracy")) for arm in several]
        parts = [
            f"{names[arm['id']]} {percent(one['seed_sd'])} over {one['n_seeds']} seeds"
            for arm, one in found
            if one is not None and one["seed_sd"] is not None
        ]
        errors = [one["standard_error"] for _, one in found if one and one["standard_error"] is not None]
        if parts:
            few = ", ".join(parts[:_MOST_SENTENCES])
            more = f" and {len(parts) - _MOST_SENTENCES} more" if len(parts) > _MOST_SENTENCES else ""
            beside = f"; the standard error from the questions is {percent(max(errors))} at most" if errors else ""
            said.append(f"{benchmark}: standard deviation between seeds in points: {few}{more}{beside}")
    said.append("Intervals are about other seeds and other questions of the same kind")
    if any(len(arm["seeds"]) == 1 for arm in comparison["arms"] if arm["status"] == "completed"):
        said.append("What was run with one seed is taken to vary between seeds as much as the rest")
    return said


def _some(values: Sequence[str]) -> str:
    """All of a few values, the first ones of many."""
    more = f" and {len(values) - _MOST_VALUES} more" if len(values) > _MOST_VALUES else ""
    return ", ".join(values[:_MOST_VALUES]) + more


def _about_images(pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    shared = {pair["benchmark"]: pair for pair in pairs if pair["p_by_image"] is not None}
    said = [
        f"{benchmark}: {pair['n']:,} questions about {pair['n_images']:,} images; those about one image count as "
        "dependent"
        for benchmark, pair in shared.items()
    ]
    few = dict.fromkeys(pair["benchmark"] for pair in pairs if pair["n_images"] < _FEW_IMAGES)
    return said + [
        f"{benchmark}: fewer than {_FEW_IMAGES} images, so its intervals are too narrow" for benchmark in few
    ]


def where(comparison: Comparison) -> str:
    """Where the run folders lie, as short as it can be said from here; empty where they share nothing."""
    folder = short_folders([run["run_dir"] for run in comparison["runs"]])[0]
    if not folder:
        return ""
    path, here = Path(folder).resolve(), Path.cwd()
    return f"Runs lie in {path.relative_to(here) if here in path.parents else folder}"


def _advice(run: Mapping[str, Any]) -> str:
    return f". {run['advice']}" if run["advice"] else ""
