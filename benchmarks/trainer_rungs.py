"""Eight LoRA trials of which the best go on at each rung, against the same halving over the Trainer's processes.

The peers are Optuna's SuccessiveHalvingPruner over processes of Trainer and PEFT, which are scored at their rungs by
the same questions, and all trials of the Trainer to their end, as `sweep_trainer` ran them last (that machine's CPU
seconds are in ``peers/trainer.json``). Both sides here run beside each other, one on each of two cores.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.measurement import Row
from benchmarks.trials import CACHED, TRAINER, apart, best, near, prepared
from mgm_exp.store import read_json

RUNGS = (
    "sweep.pruner.name=rungs",
    "sweep.pruner.reduction_factor=2",
    "train.validation.every_steps=2",
    "train.validation.questions=32",
)
ALL, OPTUNA = 8.0, 2.5


def run(work: Path, quick: bool = False) -> list[Row]:
    """Both rows."""
    bench = prepared(work, quick)
    count = len(bench.points)
    with ThreadPoolExecutor(1) as beside:
        pruned = beside.submit(bench.pruned_trainers)
        rungs = bench.sweep("rungs", CACHED, *RUNGS)
        cpu_s, scores, steps = pruned.result()
    is_new = quick or not TRAINER.exists()
    trainer = [bench.trainer(number) for number in range(count)] if is_new else read_json(TRAINER)["trials"]
    begun = [found["losses"][: len(mine)] for found, mine in zip(trainer, rungs.losses, strict=True)]
    winner = best([found["score"] for found in trainer])
    differ = "" if rungs.winner == winner else ": they DIFFER"
    exactness = (
        f"pruned: as far as each trial goes, {near(apart(rungs.losses, begun))} of the Trainer's; winner: trial "
        f"{rungs.winner}, of all the Trainer's trials {winner}{differ}, under Optuna's pruner {best(scores)}"
    )
    done = sum(map(len, rungs.losses))
    how = f"rungs at 2, 4 and 8 of {bench.steps} steps, half go on: {done} of {bench.steps * count} steps"
    theirs = sum(found["cpu_s"] for found in trainer)
    everything, halved = (None, None) if quick else (ALL, OPTUNA)
    return [
        Row("sweep8 + rungs, and all trials of the Trainer", "s", rungs.cpu_s, theirs, everything, exactness, how),
        Row(
            "sweep8 + rungs, and Optuna's pruner over the Trainer's processes",
            "s",
            rungs.cpu_s,
            cpu_s,
            halved,
            exactness,
            f"{how}; SuccessiveHalvingPruner(min_resource=2, reduction_factor=2): {steps} steps",
        ),
    ]
