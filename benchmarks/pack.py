"""A pack of K LoRA trials against the same trials one after another, in one process with the same caches.

The model and data of :mod:`benchmarks.prototype`, features of the towers kept before anything is measured, the base
loaded once in both ways: what is left is what packing itself gives or takes. Trials differ in rank, alpha, rate,
dropout and seed, so that each sees the samples in an order of its own (its seed is its number). CPU time of the whole
stage (adapters put in, steps, checkpoint, outputs), one thread, repeats alternated, median of the ratios. On one core
nothing is idle that a pack could use: the goal is that it costs nothing. On a GPU benchmarks/gpu.py measures the pack
of 8.
"""

from __future__ import annotations

import functools
import gc
import json
import shutil
import statistics
import time
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
        ways = {"pack": self._pack, "serial": self._serial}
        self._serial(self._jobs("warm", 1, micro_batch))  # imports, and features of the towers
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        losses: dict[str, list[list[float]]] = {}
        for repeat in range(repeats):
            for name in sorted(ways, reverse=repeat % 2 == 1):
                jobs = self._jobs(name, count, micro_batch)
                gc.collect()
                began = self.clock()
                ways[name](jobs)
                seconds[name].append(self.clock() - began)
                losses[name] = [_losses(job) for job in jobs]
        apart = max(
            abs(ours - alone)
            for mine, other in zip(losses["pack"], losses["serial"], strict=True)
            for ours, alone in zip(mine, other, strict=True)
        )
        clock = "one thread, CPU time" if self.device == "cpu" else "wall time"
        ratios = [serial / pack for pack, serial in zip(seconds["pack"], seconds["serial"], strict=True)]
        middle = ratios.index(statistics.median_low(ratios))  # the repeat of the median ratio
        print(count, micro_batch, {name: [round(x, 2) for x in values] for name, values in seconds.items()}, flush=True)
        return Row(
            f"pack of {count}, micro-batches of {micro_batch}: time against the same trials in turn",
            "s",
            seconds["pack"][middle],
            seconds["serial"][middle],
            GOAL if count == 8 else None,
            f"tolerance: losses {'within' if apart <= NEAR else 'DIFFER:'} {apart:.1g}",
            f"{count} LoRA trials of {self.steps} steps of 4 samples, ranks 2 to 16, own seeds and dropout, 8 M "
            f"parameters, fp32, {clock}; ratios {', '.join(f'{ratio:.2f}' for ratio in sorted(ratios))}",
        )

    def _jobs(self, way: str, count: int, micro_batch: int) -> list[Any]:
        from mgm_exp.compose import compose
        from mgm_exp.config import plain
        from mgm_exp.train import TrainJob

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
                alone(training(job, ranks, Listener(), StopRequest(), functools.partial(assemble, build=base.build)))


def _losses(job: Any) -> list[float]:
    rows = [json.loads(line) for line in job.metrics.read_text(encoding="utf-8").splitlines()]
    return [row["loss"] for row in rows if "event" not in row]
