"""Trials in a worker that stays, and the same trials in a process each: what a start costs, and what eight cost.

What all trials share (data, captions, the align stage) is made before anything is measured. Each trial then loads the
model, trains a LoRA for some steps, answers questions, and leaves its record. CPU time of the processes, in one run,
on the same data; trials alternate between the two.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measurement import Row

TRIALS, TRIALS_QUICK = 8, 2
GOAL_START = 20.0
STEPS = 8
SETTINGS = (
    "debug=fast", "device=cpu", "train.precision=fp32", f"train.max_steps={STEPS}", "train.global_batch_size=4",
    "train.micro_batch_size=4", "eval.demo.baselines=false", "eval.max_questions=8",
)  # fmt: skip
_ENDED_S = [0.0]


def run(work: Path, quick: bool = False) -> list[Row]:
    """Measures both."""
    from mgm_exp.slots import ChildProcesses
    from mgm_exp.warm.slots import WarmSlots

    trials = TRIALS_QUICK if quick else TRIALS
    program = [sys.executable, "-m", "benchmarks.warm_start"]
    cold, warm = work / "cold", work / "warm"
    new, staying = ChildProcesses([[]], program), WarmSlots([[]], program, say=lambda sentence: None)
    _trial(new, cold, 0, rank=2)
    shutil.copytree(cold / "store", warm / "store", symlinks=True)
    for stage in ("instruct", "evaluate"):
        shutil.rmtree(warm / "store" / stage)
    spent = {"cold": 0.0, "warm": 0.0}
    try:
        for number in range(1, trials + 1):
            spent["cold"] += _spent(lambda number=number: _trial(new, cold, number, rank=2 + number))  # type: ignore[misc]
            before = _of_workers(staying)
            _trial(staying, warm, number, rank=2 + number)
            spent["warm"] += _of_workers(staying) - before
    finally:
        staying.close()
    starts = {
        root.name: [
            json.loads((_folder(root, number) / "start.json").read_text(encoding="utf-8"))["cpu_s"]
            for number in range(first, trials + 1)
        ]
        for root, first in ((cold, 1), (warm, 2))
    }
    same = all(_losses(cold, number) == _losses(warm, number) for number in range(1, trials + 1))
    exactness = "bit-equal: losses and adapters of all trials" if same else "DIFFERENT losses or adapters"
    ours, peer = statistics.median(starts["warm"]), statistics.median(starts["cold"])
    return [
        Row(
            "start of a trial: warm worker and new process",
            "CPU s until the first step",
            ours,
            peer,
            GOAL_START,
            exactness,
            f"tiny model, LoRA, what is shared lies in the store; median of trials 2 to {trials} of one worker "
            "(the end of the trial before included), and of as many processes",
        ),
        Row(
            f"{trials} LoRA trials: warm worker and a process each",
            "CPU s",
            spent["warm"],
            spent["cold"],
            None,
            exactness,
            f"tiny model, {STEPS} steps of 4 samples, 8 questions each; the worker's own start included",
        ),
    ]


def _trial(slots: Any, root: Path, number: int, rank: int) -> None:
    from mgm_exp.slots import Work, in_sweep

    given = (*SETTINGS, f"adapter.rank={rank}", f"paths.root={root}", *in_sweep(number, "s", str(number)))
    slots.start(Work(number, _folder(root, number), given))
    ended: Sequence[Any] = []
    while not ended:
        ended = slots.ended(1.0)
    if ended[0][1].exit_code != 0:
        raise RuntimeError(f"trial {number} ended with {ended[0][1]}")


def _folder(root: Path, number: int) -> Path:
    return root / "sweeps" / "s" / str(number)


def _spent(work: Any) -> float:
    """CPU seconds of the children that end meanwhile."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    work()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _of_workers(slots: Any) -> float:
    """CPU seconds of the workers that are there."""
    ticks = 0
    for pid in slots.pids:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _losses(root: Path, number: int) -> tuple[list[Any], bytes]:
    folder = _folder(root, number)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row.get("loss") for row in rows], (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def timed_experiment(config: Any, run_dir: Path, **kwargs: Any) -> dict[str, Any]:
    """The experiment; notes the CPU time from the end of the one before (or the process's start) to its first step."""
    from mgm_exp.experiment import run_experiment
    from mgm_exp.store import write_json_atomic
    from mgm_exp.train.assemble import Stage

    begin = Stage.steps_from

    def noting(self: Stage, *args: Any, **given: Any) -> Any:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json_atomic(run_dir / "start.json", {"cpu_s": time.process_time() - _ENDED_S[0]})
        return begin(self, *args, **given)

    Stage.steps_from = noting  # type: ignore[method-assign]
    try:
        return run_experiment(config, run_dir, **kwargs)
    finally:
        Stage.steps_from = begin  # type: ignore[method-assign]
        _ENDED_S[0] = time.process_time()


if __name__ == "__main__":
    from mgm_exp.command import main

    sys.exit(main(task=timed_experiment, child=[sys.executable, "-m", "benchmarks.warm_start"]))
