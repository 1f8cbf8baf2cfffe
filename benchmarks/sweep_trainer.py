"""Eight LoRA trials: as sweeps of ours, and what a user would do instead, a process of Trainer and PEFT for each.

All sides do the same work; see :mod:`benchmarks.trials`. CPU time of whole process trees, start included. Two run at a
time, one on each of two cores; ours and the Trainer's alternate. One run of the Trainer's trials serves all rows: eight
processes, whose sum varies less than one command does. The row nearest to its goal is the median of three. With rungs
(at steps 2, 4 and 8 of 16) the better half goes on: ours against all trials of the Trainer, and against Optuna's
SuccessiveHalvingPruner over its processes, which are scored at their rungs by the same questions.

How much could be saved at all is measured with them: :mod:`benchmarks.peers.floor` trains and asks the same trials in
one bare process, which is the least that they take on this machine, whoever runs them. A goal above the Trainer's time
over that process's cannot be met against this peer, and its row says so.
"""

from __future__ import annotations

import json
import statistics
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from benchmarks.measurement import Row
from benchmarks.trials import BATCH, CACHED, NEAR, Bench, Sweep, apart, best, losses_of, near, prepared

# The same batches without their padding, and questions that are answered by merged weights.
FASTER = (
    CACHED,
    "train.padding_free=true",
    "train.loss_kernel=fused",
    "train.block_kernel=fused",
    "eval.merge_adapter=true",
)
RUNGS = (
    "sweep.pruner.name=rungs",
    "sweep.pruner.reduction_factor=2",
    "train.validation.every_steps=2",
    "train.validation.questions=32",
)
SWEEPS = {
    "bit_equal": (CACHED,),
    "tolerance": FASTER,
    "grouped": (*FASTER, "train.group_by=like_length"),
    "rungs": (*FASTER, *RUNGS),
}
# All steps, and by rungs.
FLOORS = ("floor", "floor_with_rungs")
PARTS = (
    ("imports, composing and loading", "loaded_s"),
    ("images", "seen_s"),
    ("steps and adapters", "step_s"),
    ("questions", "asked_s"),
)
# In which order, and how often.
TURNS = ("bit_equal", "tolerance", "grouped", "floor", "tolerance", "rungs", "floor_with_rungs", "tolerance")
BIT_EQUAL, TOLERANCE, OTHER_BATCHES, ALL_WITH_RUNGS, OPTUNA = 2.1, 3.0, 4.0, 8.0, 2.5


def run(work: Path, quick: bool = False) -> list[Row]:
    """All rows, from one run of the Trainer's trials."""
    bench = prepared(work, quick)
    count = len(bench.points)
    trials = [bench.trial(number) for number in range(count)]
    with ThreadPoolExecutor(2) as two:
        pruned = two.submit(bench.pruned_trainers, trials)  # the longest
        sweeps: dict[str, list[Future[Sweep]]] = {name: [] for name in SWEEPS}
        trainers = []
        floors: list[Future[dict[str, Any]]] = []
        turns = (*SWEEPS, *FLOORS) if quick else TURNS
        for name, number in zip_longest(turns, range(count)):
            if name in FLOORS:
                floors.append(two.submit(bench.floor, name, trials, bench.rungs if floors else []))
            elif name is not None:
                again = f"{name}_{len(sweeps[name])}" if sweeps[name] else name
                sweeps[name].append(two.submit(bench.sweep, again, *SWEEPS[name]))
            if number is not None:
                trainers.append(two.submit(bench.trainer, number, trials[number]))
        fresh = two.submit(bench.fresh, count - 1)
        found = [trainer.result() for trainer in trainers]
        peers = Peers(bench, found, [floor.result() for floor in floors], quick)
        ours = {name: [sweep.result() for sweep in each] for name, each in sweeps.items()}
        halved = peers.halved(ours["rungs"][0], *pruned.result())
        return [*peers.whole(ours, fresh.result()), *halved, *peers.floor_rows()]


def _is_bit_equal(trial: Path, fresh: Path) -> bool:
    """Losses, adapter and answers of a trial in a sweep and in a process of its own."""
    same_losses = losses_of(trial) == losses_of(fresh)
    files = ("adapter/adapter_model.safetensors", "predictions/custom.jsonl")
    said = [[(folder / name).read_bytes() for folder in (trial, fresh)] for name in files]
    predictions = [[json.loads(line)["prediction"] for line in text.decode().splitlines()] for text in said[1]]
    return same_losses and said[0][0] == said[0][1] and predictions[0] == predictions[1]


@dataclass
class Peers:
    """The Trainer's trials, and rows against them; what the bare process took for all steps, and by rungs."""

    bench: Bench
    found: list[dict[str, Any]]
    floors: list[dict[str, Any]]
    quick: bool

    @property
    def cpu_s(self) -> float:
        return float(sum(one["cpu_s"] for one in self.found))

    @property
    def winner(self) -> int:
        return best([one["score"] for one in self.found])

    def whole(self, ours: dict[str, list[Sweep]], alone: Path) -> list[Row]:
        """Sweeps whose trials all go to their ends."""
        equal, tolerance, grouped = ours["bit_equal"], ours["tolerance"], ours["grouped"]
        number = len(self.found) - 1
        is_equal = _is_bit_equal(equal[0].folder / str(number), alone)
        said = f"trial {number} and the same run in a process of its own, nothing cached: "
        said += "losses, adapter and answers bit-equal" if is_equal else "they DIFFER"
        other = "rows of like length are together: other batches, losses not compared; winner: trial "
        other += str(grouped[0].winner)
        return [
            self._row("bit-equal", equal, BIT_EQUAL, f"{said}; {self._near(equal)}", CACHED),
            self._row("tolerance", tolerance, TOLERANCE, self._near(tolerance), ", ".join(SWEEPS["tolerance"])),
            self._row("other batches", grouped, OTHER_BATCHES, other, ", ".join(SWEEPS["grouped"])),
        ]

    def halved(self, rungs: Sweep, pruned_s: float, pruned_scores: list[float | None], pruned_steps: int) -> list[Row]:
        """The sweep by rungs."""
        steps = self.bench.steps
        begun = [one["losses"][: len(mine)] for one, mine in zip(self.found, rungs.losses, strict=True)]
        differ = "" if rungs.winner == self.winner else ": they DIFFER"
        exactness = (
            f"pruned: as far as each trial goes, {near(apart(rungs.losses, begun))} of the Trainer's; winner: trial "
            f"{rungs.winner}, of all the Trainer's trials {self.winner}{differ}, under Optuna's pruner "
            f"{best(pruned_scores)}"
        )
        done = sum(map(len, rungs.losses))
        how = f"rungs at 2, 4 and 8 of {steps} steps, half go on: {done} of {steps * len(self.found)} steps"
        halving = f"{how}; SuccessiveHalvingPruner(min_resource=2, reduction_factor=2): {pruned_steps} steps"
        first, second = "all trials of the Trainer", "Optuna's pruner over the Trainer's processes"
        goals = (None, None) if self.quick else (ALL_WITH_RUNGS, OPTUNA)
        least = self.floors[1]["cpu_s"]
        return [
            Row(f"sweep8 + rungs, and {peer}", "s", rungs.cpu_s, took, goal, exactness, said, most=took / least)
            for peer, took, goal, said in (
                (first, self.cpu_s, goals[0], how),
                (second, pruned_s, goals[1], halving),
            )
        ]

    def floor_rows(self) -> list[Row]:
        """What the bare process took, which is the most that the other rows can reach."""
        rows = []
        for what, floor in zip(("all steps", "rungs at 2, 4 and 8"), self.floors, strict=True):
            begun = [one["losses"][: len(mine)] for one, mine in zip(self.found, floor["losses"], strict=True)]
            parts = ", ".join(f"{part} {floor[key]:.1f} s" for part, key in PARTS)
            rows.append(
                Row(
                    f"the floor of sweep8, {what}, and the Trainer's processes",
                    "s",
                    floor["cpu_s"],
                    self.cpu_s,
                    None,
                    f"{near(apart(floor['losses'], begun))} of the Trainer's",
                    f"{len(begun)} trials, {sum(map(len, begun))} steps of {BATCH} rows in one bare process: {parts}",
                )
            )
        return rows

    def _near(self, sweeps: list[Sweep]) -> str:
        first, *others = sweeps
        far = apart(first.losses, [one["losses"] for one in self.found])
        differ = far > NEAR or first.winner != self.winner or any(other.losses != first.losses for other in others)
        said = f"losses of all steps within {far:.1g} of the Trainer's; winner: trial {first.winner}, the Trainer's "
        return f"{said}{self.winner}" + (": they DIFFER" if differ else "")

    def _row(self, what: str, sweeps: list[Sweep], goal: float, exactness: str, switches: str) -> Row:
        loaded = sum(one["loaded_s"] for one in self.found)
        step = statistics.median(second for one in self.found for second in one["step_s"])
        count = len(self.found)
        each = [sweep.cpu_s for sweep in sweeps]
        how = (
            f"{count} trials of {self.bench.steps} steps of {BATCH} rows, {count} processes of Trainer and PEFT: "
            f"{loaded:.0f} s of them imports and loading, {step:.2f} s a step; one command, nothing in its store "
            f"before: {switches}"
        )
        if len(each) > 1:
            how += f"; median of {', '.join(f'{one:.1f}' for one in each)} s, their losses equal"
        median = statistics.median(each)
        most = self.cpu_s / self.floors[0]["cpu_s"]
        return Row(f"sweep8, {what}", "s", median, self.cpu_s, None if self.quick else goal, exactness, how, most=most)
