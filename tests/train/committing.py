"""Not a test: a short stage in the folder that is given; says which checkpoints it has committed."""

from __future__ import annotations

from pathlib import Path

import mgm_exp.data.batches
import mgm_exp.model.adapters
import mgm_exp.train.loop  # noqa: F401 (all that a stage loads, before it is traced)
from mgm_exp.train import TrainJob, run_stage
from tests.system_calls import say

from .conftest import job_in, lora


def job_of(folder: Path) -> TrainJob:
    return job_in(folder, adapter=lora(dropout=0.1), steps=2, every_steps=1, keep=2, global_batch=2)


def train(folder: Path) -> None:
    run_stage(job_of(folder), on_checkpoint=lambda checkpoint: say(f"committed {checkpoint.name}"))
