"""Not a test: trains in a process of its own that is killed (SIGKILL, nothing is cleaned up) at a chosen moment.

The processes come from a server that has imported everything and computed nothing: forking one is quick and safe.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable
from typing import Any

from mgm_exp.train import TrainJob, checkpoint, engine, run_stage

MOMENTS = ("row written", "tensors written", "all files written", "checkpoint published")
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["mgm_exp.train.loop", "mgm_exp.model.adapters", "mgm_exp.data.batches", "peft"])


def train_until_killed(job: TrainJob, moment: str, step: int, timeout_s: float = 600) -> None:
    """Trains ``job`` from another process, which kills itself at ``moment`` (one of MOMENTS) of ``step``."""
    process = _SERVER.Process(target=_train, args=(job, moment, step))
    process.start()
    process.join(timeout_s)
    assert process.exitcode == -signal.SIGKILL, f"{moment} of step {step} was not reached: {process.exitcode}"


def _train(job: TrainJob, moment: str, step: int) -> None:
    callbacks: dict[str, Callable[[Any], None]] = {}
    name = f"step-{step:06d}"
    if moment == "row written":
        callbacks["on_row"] = lambda row: _kill_if(row["step"] >= step and "event" not in row)
    elif moment == "checkpoint published":
        callbacks["on_checkpoint"] = lambda folder: _kill_if(folder.name == name)
    elif moment == "tensors written":
        every = job.experiment().train.checkpoint.every_steps or 1
        write, saves = engine.Snapshot.write, itertools.count(every, every)
        engine.Snapshot.write = lambda *args: (write(*args), _kill_if(next(saves) == step))[0]  # type: ignore[method-assign]
    else:
        publish = checkpoint.publish_folder
        checkpoint.publish_folder = lambda unfinished, final: (
            _kill_if(final.name == name),
            publish(unfinished, final),
        )[1]
    run_stage(job, **callbacks)  # type: ignore[arg-type]


def _kill_if(is_time: bool) -> None:
    if is_time:
        os.kill(os.getpid(), signal.SIGKILL)
