"""A stage that meets one fault after another ends as one that met none, to the last bit."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mgm_exp.train import TrainJob, run_stage
from tests.fault_table import met

from .conftest import job_in, lora
from .soak import FAULTS, soak
from .test_loop import losses, output_bytes


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path | None]:
    """A file system of 64 MB of its own, where mounting one is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    yield folder if mounted else None
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("steps", "every", "rounds"), [(36, 3, 9), pytest.param(2000, 25, 100, marks=pytest.mark.slow)]
)
def test_through_every_fault_it_ends_as_an_undisturbed_one(
    tmp_path: Path, small_disk: Path | None, steps: int, every: int, rounds: int
) -> None:
    settings: dict[str, Any] = {
        "adapter": lora(dropout=0.1),
        "steps": steps,
        "every_steps": every,
        "keep": 3,
        "warmup_ratio": 0.1,
        "lr": 1e-3,
        "global_batch": 2,
    }
    undisturbed = job_in(tmp_path, name="undisturbed", **settings)
    run_stage(undisturbed)
    job: TrainJob = job_in(small_disk or tmp_path, name="soaked", **settings)
    cost = soak(job, every, seed=7, rounds=rounds, ballast=small_disk / "ballast" if small_disk else None)
    assert losses(job) == losses(undisturbed)
    assert output_bytes(job) == output_bytes(undisturbed)
    assert cost.beyond == 0
    assert set(cost.faults) >= set(FAULTS) - ({"full"} if small_disk is None else set())
    assert small_disk is None or cost.full_disks > 0, "the disk was never full"
    for fault in FAULTS:
        met(f"soak: {fault}", cost.faults[fault])
    shutil.rmtree(undisturbed.work)
