"""kill -9 of the process of a pack, and of the sweep: the same trials come to the same results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mgm_exp.folders import read_record

pytestmark = pytest.mark.slow
SWEEP = [
    *("-m", "hydra/launcher=packed", "adapter=lora_r8,lora_r16", "train.lr=1e-3,3e-3", "adapter.dropout=0.05"),
    *("device=cpu", "tracker.mode=disabled", "data.demo_images=8", "data.demo_questions=16", "eval.max_questions=2"),
    *("eval.demo.baselines=false", "train.align.max_steps=0", "train.max_steps=12", "train.global_batch_size=2"),
    *("train.micro_batch_size=2", "train.checkpoint.every_steps=2", "train.checkpoint.every_minutes=null"),
    *("sweep.name=s",),
]


def start(root: Path) -> subprocess.Popen[bytes]:
    with open(root.with_suffix(".txt"), "ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "mgm_exp", *SWEEP, f"paths.root={root}"], stdout=file, stderr=subprocess.STDOUT
        )


def losses(root: Path, number: int) -> list[float]:
    lines = (root / "sweeps" / "s" / str(number) / "metrics.jsonl").read_text().splitlines()
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return [row["loss"] for row in rows if "event" not in row]


def until(happened: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 600
    while not happened():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def process_of_the_pack(sweep: int) -> int:
    children = Path(f"/proc/{sweep}/task/{sweep}/children").read_text().split()
    return next(int(pid) for pid in children if "mgm_exp.packed.process" in Path(f"/proc/{pid}/cmdline").read_text())


def steps(root: Path) -> int:
    try:
        return len(losses(root, 3))
    except FileNotFoundError:
        return 0


def test_a_killed_pack_and_a_killed_sweep_come_to_the_same_results(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(whole).wait() == 0

    sweep = start(broken)
    until(lambda: steps(broken) >= 4, sweep)
    os.kill(process_of_the_pack(sweep.pid), signal.SIGKILL)  # goes on by itself, in halves
    until(lambda: "resumed" in (broken / "sweeps/s/0/metrics.jsonl").read_text(), sweep)
    sweep.kill()
    sweep.wait()
    assert start(broken).wait() == 0  # the same command

    for number in range(4):
        assert read_record(broken / "sweeps" / "s" / str(number) / "result.json")["status"] == "completed"
        assert len(losses(broken, number)) == 12
        assert losses(broken, number) == pytest.approx(losses(whole, number), abs=5e-6)
    assert "its 4 trials go on from their checkpoints, 2 at a time" in broken.with_suffix(".txt").read_text()
