"""One run whose processes are on two nodes of a Slurm job: the same losses, and what is left when one of them dies."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launcher.slurm.conftest import Cluster, wait_until

ROOT = Path(__file__).resolve().parents[3]
# Real training of the tiny model, all stages.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
FAST = ("debug=fast", "device=cpu", "adapter=lora_r8")


def submitted(cluster: Cluster, folder: Path, *arguments: str) -> str:
    """The number of a job over two nodes that runs one experiment."""
    folder.mkdir()
    command = shlex.join([sys.executable, "-m", "mgm_exp", *FAST, f"paths.root={folder}", *arguments])
    script = folder / "job.sh"
    script.write_text(f"#!/bin/sh\ncd {ROOT}\nexec {command}\n")
    return cluster.call(
        "sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={folder}/job.out", str(script)
    ).strip()


def wait_for_end(cluster: Cluster, job: str) -> str:
    return wait_until(lambda: (state := cluster.jobs()[job]) not in ("PENDING", "RUNNING", "COMPLETING") and state,
                      "the job has ended", 600)  # fmt: skip


def rows_of(folder: Path) -> list[dict]:
    (file,) = folder.glob("runs/*/*/metrics.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines() if '"event"' not in line]


def test_a_run_over_two_nodes_has_the_losses_of_one_process(cluster: Cluster, tmp_path: Path) -> None:
    two = tmp_path / "two"
    job = submitted(cluster, two, "devices=2", "zero=3")
    state = wait_for_end(cluster, job)
    log = (two / "job.out").read_text()
    assert state == "COMPLETED", log
    assert "instruct: 2 process(es) on " in log
    alone = tmp_path / "alone"
    done = subprocess.run(
        [sys.executable, "-m", "mgm_exp", *FAST, f"paths.root={alone}"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = rows_of(alone)
    assert len(expected) >= 4 and {row["stage"] for row in expected} == {"align", "instruct"}
    assert [(row["stage"], row["step"]) for row in rows_of(two)] == [(row["stage"], row["step"]) for row in expected]
    assert [row["loss"] for row in rows_of(two)] == pytest.approx([row["loss"] for row in expected], rel=1e-5)


def test_nothing_is_left_on_any_node_when_the_command_is_killed(cluster: Cluster, tmp_path: Path) -> None:
    two = tmp_path / "two"
    job = submitted(cluster, two, "devices=2", "train.max_steps=10000", "train.align.max_steps=0")

    def workers() -> list[int]:
        found = list(map(int, filter(str.isdigit, os.listdir("/proc"))))
        return [pid for pid in found if "mgm_exp.train.worker" in (line := _command_line(pid)) and str(two) in line]

    wait_until(lambda: list(two.glob("store/instruct/*.work/metrics.jsonl")), "it trains", 300)
    assert len(workers()) == 2
    cluster.call("scancel", "--signal=KILL", "--batch", job)
    wait_until(lambda: not workers(), "its processes have ended", 60)
    wait_for_end(cluster, job)


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
