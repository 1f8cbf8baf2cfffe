"""What a search on the demo costs with and without pruning, until it has the best score that is known.

One real search without pruning (random points, so that their order means nothing) gives each trial's validation scores
and final score. It is then gone through again in many orders, with the pruner of ``lora_search`` and without, through
Optuna itself: what a trial costs is its steps. So many orders stand for as many seeds of a search, and nothing of it
is simulated but the order.
"""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path
from typing import Any

from benchmarks.measurement import Row

TRIALS, TRIALS_QUICK, ORDERS = 24, 3, 200
GOAL = 0.4
# What counts as the best known score: within what two runs of equal quality differ by on 400 questions.
TOLERANCE = 0.02


def run(work: Path, quick: bool = False) -> list[Row]:
    """Runs the search, and goes through it again."""
    from mgm_exp.command import run_sweep

    fast = ["debug=fast", "train.max_steps=6", "train.validation.every_steps=2"] if quick else []
    run_sweep(
        [
            "+sweeps=lora_search",
            f"sweep.n_trials={TRIALS_QUICK if quick else TRIALS}",
            "sweep.sampler.name=random",
            "sweep.pruner.name=none",
            "sweep.name=curves",
            "tracker.mode=disabled",
            f"paths.root={work}",
            *fast,
        ]
    )
    return rows_of(work / "sweeps" / "curves")


def rows_of(folder: Path, orders: int = ORDERS) -> list[Row]:
    """The comparison, from the folder of a search without pruning."""
    curves = read_curves(folder)
    totals, costs, finals, limits, climbed = [], [], [], [], []
    top = max(curve["value"] for curve in curves) - TOLERANCE
    for seed in range(orders):
        order = list(curves)
        random.Random(seed).shuffle(order)
        plain_cost, plain_total, _ = search(order, None)
        cost, total, best = search(order, "lora_search")
        totals.append((total, plain_total))
        costs.append((cost, plain_cost))
        limits.append(never_wrong(order))
        finals.append(best >= top)
        climbed.append(climb(order, plain_total))
    exactness = (
        f"the best score is found in {sum(finals)} of {orders} orders (within {TOLERANCE:g}); without pruning in all"
    )
    what = (
        f"{len(curves)} random points of lora_search in {orders} orders; steps of the instruct stage; a pruner that is "
        f"never wrong at its first rung needs {statistics.fmean(limits):.0f} until the best score"
    )
    return [
        Row(
            name,
            "steps",
            statistics.fmean(ours for ours, _ in pairs),
            statistics.fmean(plain for _, plain in pairs),
            1 / GOAL,
            exactness,
            what,
        )
        for name, pairs in (
            ("a whole search on the demo: with pruning and without", totals),
            ("a search on the demo until its best score: with pruning and without", costs),
        )
    ] + [
        Row(
            "a whole search on the demo: by rungs and with Optuna's SuccessiveHalvingPruner",
            "steps",
            statistics.fmean(spent for spent, _ in climbed),
            statistics.fmean(spent for spent, _ in totals),
            None,
            f"the best score is found in {sum(best >= top for _, best in climbed)} and {sum(finals)} of {orders} "
            f"orders (within {TOLERANCE:g})",
            f"the same points and orders; rungs by thirds from the first validation point, synchronous; in full: "
            f"{statistics.fmean(plain for _, plain in totals):.0f} steps",
        )
    ]


def read_curves(folder: Path) -> list[dict[str, Any]]:
    """Each trial's validation scores by step, its steps, and its value."""
    record = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    curves = []
    for trial in record["trials"]:
        run_dir = folder / trial["run_dir"]
        lines = (run_dir / "reports.jsonl").read_text(encoding="utf-8").splitlines()
        points = [(row["step"], row["value"]) for row in map(json.loads, lines)]
        steps = json.loads((run_dir / "result.json").read_text(encoding="utf-8"))["steps"]
        curves.append({"points": points, "steps": steps, "value": trial["values"][0]})
    return curves


def search(order: list[dict[str, Any]], preset: str | None) -> tuple[int, int, float]:
    """Steps until the best value of all is reached (or all, where it is not), all steps, and the best value reached."""
    import optuna

    from mgm_exp.compose import compose
    from mgm_exp.search import make_pruner

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    pruner: Any = optuna.pruners.NopPruner()
    if preset is not None:
        if preset not in _PRUNERS:
            config = compose([f"+sweeps={preset}", "hydra.mode=RUN"])
            _PRUNERS[preset] = make_pruner(config.sweep.pruner, order[0]["points"][0][0])
        pruner = _PRUNERS[preset]
    study = optuna.create_study(direction="maximize", pruner=pruner)
    known = max(curve["value"] for curve in order) - TOLERANCE
    spent, until, best = 0, None, 0.0
    for curve in order:
        trial, is_pruned = study.ask(), False
        for step, value in curve["points"]:
            trial.report(value, step)
            if trial.should_prune():
                spent, is_pruned = spent + step, True
                break
        if is_pruned:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            continue
        spent += curve["steps"]
        study.tell(trial, curve["value"])
        best = max(best, curve["value"])
        if until is None and best >= known:
            until = spent
    return until or spent, spent, best


def climb(order: list[dict[str, Any]], most: int) -> tuple[int, float]:
    """Steps of the same trials with ``sweep.pruner.name=rungs``, and the best value that is reached.

    Args:
        most: Steps of all trials in full: more would be a fault.
    """
    from mgm_exp.config import Direction, PrunerConfig
    from mgm_exp.search.rungs import Climber, Ladder, Standing

    ladder = Ladder(order[0]["points"][0][0], PrunerConfig().reduction_factor, True, Direction.maximize)
    trials: dict[int, Climber] = {}
    while True:
        up = ladder.next_up(list(trials.values()), all_drawn=len(trials) == len(order))
        if up is None and len(trials) == len(order):
            break
        number, until = (up[0].number, up[1]) if up else (len(trials), ladder.first)
        curve = order[number]
        standing = Standing.completed if until >= curve["steps"] else Standing.paused
        points = {step: value for step, value in curve["points"] if step <= until}
        trials[number] = Climber(number, standing, until, points)
    done = [order[number] for number, trial in trials.items() if trial.standing is Standing.completed]
    left = [max(trial.points) for trial in trials.values() if trial.standing is not Standing.completed]
    spent = sum(curve["steps"] for curve in done) + sum(left)
    assert spent <= most
    return spent, max(curve["value"] for curve in done)


def never_wrong(order: list[dict[str, Any]]) -> int:
    """Steps until the best value, where each trial that becomes the best so far is run to its end and every other one
    to its first validation point: what no pruner that ends no such trial can be below."""
    known = max(curve["value"] for curve in order) - TOLERANCE
    spent, best = 0, float("-inf")
    for curve in order:
        is_better = curve["value"] > best
        spent += curve["steps"] if is_better else curve["points"][0][0]
        best = max(best, curve["value"])
        if best >= known:
            break
    return spent


_PRUNERS: dict[str, Any] = {}
