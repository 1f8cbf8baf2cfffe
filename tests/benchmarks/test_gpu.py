"""The GPU benchmark, as far as a machine without one can tell: every rung and row runs, on tiny shapes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import main, rungs
from benchmarks.ladder import Rung, Shapes, run_rung, with_overrides

ROOT = Path(__file__).resolve().parents[2]
TINY = Shapes("tiny", (120, 90), "cpu")


def test_each_rung_adds_to_those_below_it() -> None:
    found = with_overrides([Rung("a", ("x=1", "y=2")), Rung("b", ("x=3",))])
    assert [overrides for _, overrides in found] == [["x=1", "y=2"], ["x=3", "y=2"]]


def test_both_ends_of_the_ladder_compute_the_same_loss() -> None:
    listed = {rung.name: (rung, overrides) for rung, overrides in with_overrides(rungs("cpu"))}
    first, plainest = next(iter(listed.values()))
    last, fastest = listed["towers' features from the cache"]
    left_out = ("train.loss_kernel", "train.compile", "train.precision")
    fastest = [override for override in fastest if not override.startswith(left_out)]
    ends = (plainest, [*fastest, "train.loss_kernel=fused", "train.precision=fp32"])
    found = [run_rung(TINY, overrides, rung, count=1) for rung, overrides in zip((first, last), ends, strict=True)]
    assert found[0].loss == pytest.approx(found[1].loss, abs=1e-4)
    assert all(measured.tokens_per_s > 0 and measured.peak_gib is None for measured in found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "no GPU" in capsys.readouterr().out


@pytest.mark.slow
def test_a_dry_run_goes_through_every_rung_and_row(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu.py", "--dry-run", "--out", str(tmp_path / "found.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    not_run = {rung["name"]: rung["why_not"] for rung in found["ladder"] if not rung["rounds"]}
    assert set(not_run) <= {"Liger's loss"}, not_run
    assert all("needs a" in why for why in not_run.values())
    assert [row["name"].partition(":")[0] for row in found["rows"]] == [
        "head",
        "mining",
        "cache",
        "loop",
        "evaluate",
        "pack of 8",
    ]
