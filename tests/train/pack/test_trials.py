"""Trials in a pack are what they are alone: to the last bits in float64, within rounding in fp32, whoever is beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mgm_exp.config import AdapterConfig, AdapterKind, Precision
from mgm_exp.errors import Interrupted, LossNotFinite, Pruned
from mgm_exp.train import TrainJob, run_stage
from mgm_exp.train.listener import Listener
from mgm_exp.train.metrics_file import read_rows
from mgm_exp.train.pack.trials import Pack, Trial
from mgm_exp.train.stop import StopRequest

from ..conftest import job_in

# Name -> rank, alpha, dropout, peak rate, seed: no two alike.
TRIALS: dict[str, tuple[int, float, float, float, int]] = {
    "a": (2, 4.0, 0.0, 1e-2, 3),
    "b": (4, 16.0, 0.1, 3e-3, 4),
    "c": (8, 8.0, 0.3, 1e-3, 5),
    "d": (3, 1.0, 0.05, 2e-2, 3),
}
STEPS = 6


def job_of(folder: Path, name: str, where: str, **settings: Any) -> TrainJob:
    rank, alpha, dropout, lr, seed = TRIALS[name]
    adapter = AdapterConfig(f"lora_r{rank}", AdapterKind.lora, rank, alpha, dropout, ["q_proj", "v_proj", "up_proj"])
    given = {"adapter": adapter, "lr": lr, "seed": seed, "steps": STEPS, "micro_batch": 2, "warmup_ratio": 0.2}
    return job_in(folder, name=f"{where}-{name}", **{**given, **settings})


def packed(jobs: dict[str, TrainJob], listeners: dict[str, Listener] | None = None, **settings: Any) -> dict[str, Trial]:
    trials = {name: Trial(job, (listeners or {}).get(name, Listener())) for name, job in jobs.items()}
    Pack(lambda line: None, **settings).train([*trials.values()], StopRequest())
    return trials


def losses(job: TrainJob) -> list[float]:
    return [row["loss"] for row in read_rows(job.metrics) if "event" not in row]


def weights(job: TrainJob) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    newest = sorted(job.checkpoints.glob("step-*"))[-1]
    return load_file(newest / "trainable.safetensors")


def farthest(a: TrainJob, b: TrainJob) -> float:
    mine, other = weights(a), weights(b)
    assert mine.keys() == other.keys()
    return max(float((mine[name].double() - other[name].double()).abs().max()) for name in mine)


@pytest.fixture
def in_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All that is computed in fp32 is computed in float64, transformers' norms included."""
    from mgm_exp.train import assemble
    from mgm_exp.train.pack import base

    build = assemble.build_base

    def double(*args: Any) -> Any:
        model, report = build(*args)
        return model.double(), report

    for module in (assemble, base):
        monkeypatch.setattr(module, "build_base", double)
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor.double())
    yield


def test_in_float64_trials_are_what_they_are_alone(tmp_path: Path, in_float64: None) -> None:
    """Different ranks, scales, rates, dropout and orders; one is pruned in the middle, one ends early."""
    solo = {name: job_of(tmp_path, name, "solo") for name in TRIALS}
    for job in solo.values():
        run_stage(job)
    jobs = {name: job_of(tmp_path, name, "pack") for name in TRIALS}
    trials = packed(jobs)
    for name in TRIALS:
        assert trials[name].result().engine["name"] == "pack"
        assert len(losses(jobs[name])) == STEPS
        print(name, farthest(jobs[name], solo[name]), max(abs(x-y) for x,y in zip(losses(jobs[name]), losses(solo[name]))))
