"""A pack of K LoRA trials against the same trials one after another, in one process with the same caches.

The model and data of :mod:`benchmarks.prototype`, features of the towers kept before anything is measured, the base
loaded once in both ways: what is left is what packing itself gives or takes. Trials differ in rank, alpha, rate,
dropout and seed, so that each sees the samples in an order of its own (its seed is its number). CPU time of the whole
stage (adapters put in, steps, checkpoint, outputs), one thread, median of the ratios. On a CPU the two ways run beside
each other, a core each, in forks of a process that has loaded and kept everything: what else the machine does, it does
to both. On a GPU they take turns. On one core nothing is idle that a pack could use: the goal is that it costs
nothing. On a GPU benchmarks/gpu.py measures the pack of 8, and the pack of 8 with its passes replayed by CUDA graphs.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measurement import Row
from benchmarks.trials import POINTS

# Trials, samples of a micro-batch, repeats.
CASES = ((8, 4, 3), (8, 1, 3))
CASES_QUICK = ((2, 4, 1),)
STEPS, STEPS_QUICK = 6, 2
GOAL = 0.95
# As the training loop promises, fp32.
NEAR = 5e-6


def run(work: Path, quick: bool = False) -> list[Row]:
    """A row for each case."""
    import torch

    torch.set_num_threads(1)
    bench = prepared(work, 8 if quick else 32, STEPS_QUICK if quick else STEPS)
    return [bench.row(*case) for case in (CASES_QUICK if quick else CASES)]


def prepared(work: Path, images: int, steps: int, device: str = "cpu") -> Bench:
    """Model and rows on the disk; on a GPU wall time is what counts."""
    from benchmarks.prototype import make_prototype

    made = make_prototype(work / "prototype", images=images, asked=0, taught=0)
    records = work / "records.jsonl"
    rows = json.loads(made.rows.read_text(encoding="utf-8"))
    records.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Bench(work, made, records, steps, device)


class Bench:
    """Both ways to train the same trials."""

    def __init__(self, work: Path, made: Any, records: Path, steps: int, device: str = "cpu") -> None:
        self.work, self.made, self.records, self.steps, self.device = work, made, records, steps, device
        self.clock = time.process_time if device == "cpu" else time.perf_counter

    def row(self, count: int, micro_batch: int, repeats: int) -> Row:
        name = f"pack of {count}, micro-batches of {micro_batch}: time against the same trials in turn"
        ways = {"pack": self._pack, "serial": self._serial}
        goal = GOAL if count == 8 else None
        return self._compared(name, ways, count, micro_batch, repeats, goal, "own seeds and dropout")

    def graphs_row(self, count: int, repeats: int) -> Row:
        """Micro-batches of 1 on a GPU, passes of the pack replayed by CUDA graphs and launched kernel by kernel."""
        name = f"pack of {count}, micro-batches of 1: passes replayed by CUDA graphs, and launched"
        ways = {"graphs": self._pack, "launched": self._pack}
        return self._compared(name, ways, count, 1, repeats, None, "own seeds, no dropout")

    def _compared(
        self,
        name: str,
        ways: Mapping[str, Callable[[list[Any]], None]],
        count: int,
        micro_batch: int,
        repeats: int,
        goal: float | None,
        what: str,
    ) -> Row:
        """The first of two ways against the second."""
        self._serial(self._jobs("warm", 1, micro_batch))  # imports, and features of the towers
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        losses: dict[str, list[list[float]]] = {}
        run = _in_turn if self.device != "cpu" else _beside_each_other
        for repeat in range(repeats):
            order = sorted(ways, reverse=repeat % 2 == 1)
            jobs = {way: self._jobs(way, count, micro_batch) for way in order}
            gc.collect()
            for way, took in zip(order, run([partial(self._time, ways[way], jobs[way]) for way in order]), strict=True):
                seconds[way].append(took)
                losses[way] = [_losses(job) for job in jobs[way]]
        ours, peer = ways
        apart = max(
            abs(one - other)
            for mine, others in zip(losses[ours], losses[peer], strict=True)
            for one, other in zip(mine, others, strict=True)
        )
        clock = "one thread each, beside each other, CPU time" if self.device == "cpu" else "wall time"
        ratios = [slow / fast for fast, slow in zip(seconds[ours], seconds[peer], strict=True)]
        middle = ratios.index(statistics.median_low(ratios))  # the repeat of the median ratio
        print(count, micro_batch, {way: [round(x, 2) for x in values] for way, values in seconds.items()}, flush=True)
        return Row(
            name,
            "s",
            seconds[ours][middle],
            seconds[peer][middle],
            goal,
            f"tolerance: losses {'within' if apart <= NEAR else 'DIFFER:'} {apart:.1g}",
            f"{count} LoRA trials of {self.steps} steps of 4 samples, ranks 2 to 16, {what}, 8 M "
            f"parameters, fp32, {clock}; ratios {', '.join(f'{ratio:.2f}' for ratio in sorted(ratios))}",
        )

    def _time(self, way: Callable[[list[Any]], None], jobs: list[Any]) -> float:
        began = self.clock()
        way(jobs)
        return self.clock() - began

    def _jobs(self, way: str, count: int, micro_batch: int) -> list[Any]:
        from mgm_exp.compose import compose
        from mgm_exp.config import plain
        from mgm_exp.train import TrainJob

        # All images are seen before: a fork of a process that has threads can run no tower
        more = {"warm": ["train.max_steps=null", "train.epochs=1"]}
        more |= {"launched": ["adapter.dropout=0"], "graphs": ["adapter.dropout=0", "train.cuda_graphs=packs"]}
        folder = self.work / way
        shutil.rmtree(folder, ignore_errors=True)
        jobs = []
        for number, (rank, alpha, lr, dropout) in enumerate(POINTS[:count]):
            config = compose(
                [
                    *(override for override in self.made.overrides() if not override.startswith("device=")),
                    f"device={self.device}",
                    *("adapter=lora_r8", f"adapter.rank={rank}", f"adapter.alpha={alpha}", f"train.lr={lr}"),
                    *(f"adapter.dropout={dropout}", f"seed={number}", f"train.max_steps={self.steps}"),
                    *("train.global_batch_size=4", f"train.micro_batch_size={micro_batch}", "train.workers=0"),
                    *("train.feature_cache=towers", f"paths.root={self.work}", "train.precision=fp32"),
                    *more.get(way, []),
                ]
            )
            work = folder / str(number)
            work.mkdir(parents=True)
            jobs.append(TrainJob("instruct", plain(config), self.records, self.made.images, None, None, work))
        return jobs

    def _pack(self, jobs: list[Any]) -> None:
        from mgm_exp.train.listener import Listener
        from mgm_exp.train.pack.trials import Pack, Trial
        from mgm_exp.train.stop import StopRequest

        trials = [Trial(job, Listener()) for job in jobs]
        Pack(print).train(trials, StopRequest())
        for trial in trials:
            trial.result()

    def _serial(self, jobs: list[Any]) -> None:
        from mgm_exp.config import Device
        from mgm_exp.train.assemble import assemble
        from mgm_exp.train.generators import own_generators
        from mgm_exp.train.job import derived_seed
        from mgm_exp.train.listener import Listener
        from mgm_exp.train.loop import training
        from mgm_exp.train.pack.base import SharedBase
        from mgm_exp.train.ranks import Ranks
        from mgm_exp.train.step import alone
        from mgm_exp.train.stop import StopRequest

        base = SharedBase()
        for job in jobs:
            ranks = Ranks.alone(Device(self.device))
            with own_generators(derived_seed(job.experiment().seed, job.stage), ranks.device):
                alone(training(job, ranks, Listener(), StopRequest(), partial(assemble, build=base.build)))


def _in_turn(works: Sequence[Callable[[], float]]) -> list[float]:
    return [work() for work in works]


def _beside_each_other(works: Sequence[Callable[[], float]]) -> list[float]:
    """What each gives in a fork of this process, which has one thread."""
    context = multiprocessing.get_context("fork")
    ends: list[Any] = []
    for work in works:
        ours, theirs = context.Pipe(duplex=False)
        context.Process(target=_send, args=(work, theirs)).start()
        theirs.close()
        ends.append(ours)
    return [end.recv() for end in ends]


def _send(work: Callable[[], float], end: Any) -> None:
    end.send(work())


def _losses(job: Any) -> list[float]:
    rows = [json.loads(line) for line in job.metrics.read_text(encoding="utf-8").splitlines()]
    return [row["loss"] for row in rows if "event" not in row]
