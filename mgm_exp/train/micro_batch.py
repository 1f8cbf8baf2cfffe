"""A smaller micro-batch when memory ends: half as many samples in a pass, twice as many passes, the same global batch.

What a stage has settled on is written into its work folder, so that a later start begins with it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mgm_exp.store import read_json, write_json_atomic
from mgm_exp.train.job import TrainJob, stage_settings

FILE = "micro_batch.json"


def settled(job: TrainJob) -> TrainJob:
    """The job with the micro-batch that an earlier start has settled on."""
    path = job.work / FILE
    if not path.exists() or not _may_shrink(job):
        return job
    return with_micro_batch(job, int(read_json(path)["micro_batch_size"]))


def shrunk(job: TrainJob, error: str) -> TrainJob | None:
    """The job with a micro-batch of half the size or less, written down; None: not allowed, or there is none.

    Args:
        error: Why.
    """
    settings = stage_settings(job.experiment(), job.stage)
    smaller = smaller_micro_batch(settings.global_batch_size // settings.world_size, settings.micro_batch_size)
    if not _may_shrink(job) or smaller is None:
        return None
    facts = {"micro_batch_size": smaller, "before": settings.micro_batch_size, "why": error}
    write_json_atomic(job.work / FILE, facts)
    return with_micro_batch(job, smaller)


def smaller_micro_batch(samples: int, micro_batch: int) -> int | None:
    """The largest size up to half of ``micro_batch`` that divides the ``samples`` of one process in a step."""
    return next((size for size in range(micro_batch // 2, 0, -1) if samples % size == 0), None)


def with_micro_batch(job: TrainJob, size: int) -> TrainJob:
    """The same job with another micro-batch in its own stage."""
    config: dict[str, Any] = {**job.config, "train": dict(job.config["train"])}
    if job.stage == "align":
        config["train"]["align"] = {**config["train"]["align"], "micro_batch_size": size}
    else:
        config["train"]["micro_batch_size"] = size
    return replace(job, config=config)


def summary_path(work: Path, rank: int) -> Path:
    """Where a process writes down what its memory was used for."""
    return work / f"out_of_memory-{rank}.txt"


def _may_shrink(job: TrainJob) -> bool:
    return job.experiment().train.auto_micro_batch
