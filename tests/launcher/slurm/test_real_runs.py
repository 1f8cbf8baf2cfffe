"""Real training and real minutes on a real Slurm: what takes too long for every day."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launcher.slurm.conftest import Cluster, wait_until

pytestmark = pytest.mark.slow
TRAINING = (
    "debug=fast", "train.max_steps=24", "train.align.max_steps=2", "train.checkpoint.every_steps=5",
    "adapter=lora_r8,lora_r16", "sweep.name=s", "seed=3",
)  # fmt: skip


def started(root: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mgm_exp", "-m", *TRAINING, *arguments, f"paths.root={root}"]
    repository = Path(__file__).resolve().parents[3]
    return subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def outcome(root: Path) -> list[Any]:
    """Losses, metrics and weights of both trials: equal only where every bit is."""
    found: list[Any] = []
    for number in range(2):
        folder = root / "sweeps" / "s" / str(number)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses = [(row["step"], row["loss"]) for row in rows if row.get("stage") == "instruct" and "loss" in row]
        weights = hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
        found.append((losses, weights, json.loads((folder / "result.json").read_text())["metrics"]))
    return found


def is_in_training(run_dir: Path) -> bool:
    try:
        return '"stage": "instruct"' in (run_dir / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return False


def test_runs_that_went_back_into_the_queue_equal_runs_that_never_left_this_process(
    cluster: Cluster, tmp_path: Path
) -> None:
    """One is preempted by a job of a higher partition, the other is told that its time is up."""
    process = started(tmp_path / "slurm", "hydra/launcher=slurm", "hydra.launcher.cpus_per_task=8")
    sweep = tmp_path / "slurm" / "sweeps" / "s"
    wait_until(lambda: is_in_training(sweep / "0"), "trial 0 trains", 300)
    job = json.loads(next((sweep / ".slurm").glob("*/submission.json")).read_text())["job"]
    cluster.call(
        "sbatch", "--partition=high", f"--nodelist={cluster.node_of(f'{job}_0')}", "--cpus-per-task=8",
        "--output=/dev/null", "--wrap=sleep 1",
    )  # fmt: skip
    wait_until(lambda: is_in_training(sweep / "1"), "trial 1 trains", 300)
    cluster.call("scancel", "--signal=USR2", f"{job}_1")
    printed, _ = process.communicate(timeout=900)
    assert process.returncode == 0, printed
    for number in range(2):
        assert "restarted 1 time(s)" in (sweep / str(number) / "output.txt").read_text(), printed
        manifest = json.loads((sweep / str(number) / "manifest.json").read_text())
        assert not next(stage for stage in manifest["stages"] if stage["name"] == "instruct")["reused"]
    process = started(tmp_path / "here")
    printed, _ = process.communicate(timeout=900)
    assert process.returncode == 0, printed
    assert outcome(tmp_path / "slurm") == outcome(tmp_path / "here")


def test_runs_that_need_more_than_their_minutes_continue_as_often_as_it_takes(
    slurm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one is frozen and cannot save: its job ends as TIMEOUT, and another one goes on."""
    app, _ = slurm
    monkeypatch.setenv("SMALL_STEPS", "80")
    monkeypatch.setenv("SMALL_STEP_S", "1.0")
    process = app.start(
        "-m", "hydra/launcher=slurm", "hydra.launcher.timeout_min=1", "adapter.rank=1,2", "sweep.name=s",
        "sweep.pruner.name=none",
    )  # fmt: skip
    sweep = app.root / "sweeps" / "s"
    wait_until(lambda: (sweep / "1" / "steps.txt").exists(), "the second one trains")
    holder = json.loads(next((sweep / "1" / ".lease").glob("claim-*.json")).read_text())["holder"]
    parent = int(Path(f"/proc/{holder['pid']}/stat").read_text().rpartition(")")[2].split()[1])
    for number in (parent, int(holder["pid"])):
        os.kill(number, signal.SIGSTOP)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed
    assert "its time was up (hydra.launcher.timeout_min=1) before it could go back into the queue" in printed
    assert "SIGUSR2: the run is asked to save" in (sweep / "0" / "output.txt").read_text()
    for number in range(2):
        steps = [int(line) for line in (sweep / str(number) / "steps.txt").read_text().split()]
        assert sorted(set(steps)) == list(range(1, 81)) and len(steps) <= 82
