"""Sweeps on a real Slurm: what is submitted, how jobs end, and that no death of anybody loses or doubles anything."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.launcher.slurm.conftest import wait_until

SLURM = ("-m", "hydra/launcher=slurm", "hydra.launcher.mem_gb=0.2", "sweep.name=s", "sweep.pruner.name=none")
SEARCH = (*SLURM, "hydra/sweeper=mgm_optuna", "sweep.sampler.name=random")
NODE = "hydra.launcher.cpus_per_task=8"  # the whole of a pretended node


def submissions(app: Any) -> list[dict[str, Any]]:
    found = sorted(
        (app.root / "sweeps" / "s" / ".slurm").glob("*/submission.json"), key=lambda path: path.stat().st_mtime
    )
    return [json.loads(path.read_text(encoding="utf-8")) for path in found]


def states(app: Any) -> list[str]:
    return [trial["status"] for trial in app.sweep()["trials"]]


def steps(app: Any, number: int) -> list[int]:
    return [int(line) for line in (app.root / "sweeps" / "s" / str(number) / "steps.txt").read_text().split()]


def waiting(app: Any, *numbers: int) -> None:
    for number in numbers:
        wait_until(lambda n=number: (app.root / f"sweeps/s/{n}/waiting").exists(), f"trial {number} waits")


def go(app: Any, *numbers: int) -> None:
    for number in numbers:
        (app.root / f"sweeps/s/{number}/go").touch()


def ended(process: subprocess.Popen[str], timeout_s: float = 300) -> tuple[int, str]:
    printed, _ = process.communicate(timeout=timeout_s)
    return process.returncode, printed


def read_until(process: subprocess.Popen[str], words: str) -> str:
    """What it printed up to a line with these words."""
    assert process.stdout is not None
    seen = ""
    while words not in seen:
        line = process.stdout.readline()
        assert line, f"it ended without saying {words!r}: {seen}"
        seen += line
    return seen


def test_a_grid_is_one_array_whose_files_hold_no_secret(
    slurm: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    app, _ = slurm
    secrets = {"WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567", "HF_TOKEN": "hf_" + "a1B2c3D4" * 4}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    assert app(*SLURM, "adapter.rank=1,2,3", "hydra.launcher.array_parallelism=2") == 0
    (submission,) = submissions(app)
    assert f"3 trials: job {submission['job']}_[0-2]" in capfd.readouterr().out
    assert states(app) == ["completed"] * 3
    assert [trial["metrics"]["demo/accuracy"] for trial in app.sweep()["trials"]] == [0.05, 0.1, 0.15]
    assert (app.sweep_dir / "report.html").is_file()
    script = (app.sweep_dir / ".slurm" / submission["id"] / "job.sh").read_text(encoding="utf-8")
    assert "#SBATCH --array=0-2%2" in script and "#SBATCH --mem=205M" in script
    code = next((app.sweep_dir / ".slurm" / "code").iterdir())
    for number in range(3):
        assert f"code: {code / 'mgm_exp'}" in (app.sweep_dir / str(number) / "log.txt").read_text()
        assert f"--- job {submission['job']}_{number} on n" in (app.sweep_dir / str(number) / "output.txt").read_text()
    for path in app.root.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(value.encode() in content for value in secrets.values()), path
    assert app(*SLURM, "adapter.rank=1,2,3") == 0
    assert len(submissions(app)) == 1, "what is done is not submitted again"


def test_each_job_has_the_end_that_it_met_and_harms_no_other(slurm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is cancelled, one killed, one preempted, one told that its time is up; a fifth is left in peace."""
    app, cluster = slurm
    monkeypatch.setenv("SMALL_STEPS", "12")
    monkeypatch.setenv("SMALL_HOLD", "9")  # none comes to its end before it has met the other
    process = app.start(*SLURM, NODE, "adapter.rank=1,2,3,4")
    for number in range(4):
        wait_until(lambda n=number: (app.root / f"sweeps/s/{n}/steps.txt").exists(), "it trains")
        wait_until(lambda n=number: steps(app, n) and steps(app, n)[-1] == 8, "it waits before a step")
    (submission,) = submissions(app)
    job = submission["job"]
    cluster.call("scancel", f"{job}_0")
    holder = json.loads(next((app.root / "sweeps/s/1/.lease").glob("claim-*.json")).read_text())["holder"]
    os.kill(int(holder["pid"]), signal.SIGKILL)
    cluster.call(
        "sbatch", "--partition=high", f"--nodelist={cluster.node_of(f'{job}_2')}", "--cpus-per-task=8", "--mem=100M",
        "--output=/dev/null", "--wrap=sleep 1",
    )  # fmt: skip
    cluster.call("scancel", "--signal=USR2", f"{job}_3")
    wait_until(lambda: (app.root / "sweeps/s/2/result.json").exists(), "it has saved its state")
    wait_until(lambda: (app.root / "sweeps/s/3/result.json").exists(), "it has saved its state")
    go(app, 0, 1, 2, 3)
    code, printed = ended(process)
    assert (code, states(app)) == (1, ["interrupted", "completed", "completed", "completed"]), printed
    error = app.sweep()["trials"][0]["error"]["message"]
    assert f"its job was cancelled (job {job}_0; log: {app.root}/sweeps/s/0/output.txt)" in error
    assert "was killed by SIGKILL" in printed and "goes on from its checkpoint" in printed
    assert steps(app, 1)[-1] == 12 and len(steps(app, 1)) <= 13, "at most the step at hand is lost"
    for number in (2, 3):
        assert f"trial {number}: its job {job}_{number} is back in the queue" in printed, printed
        assert sorted(set(steps(app, number))) == list(range(1, 13)) and len(steps(app, number)) <= 13
        output = (app.root / f"sweeps/s/{number}/output.txt").read_text()
        assert f"--- job {job}_{number} on" in output and "restarted 1 time(s)" in output
    assert [len(entry["tasks"]) for entry in submissions(app)] == [4, 1], "only the killed one was submitted again"
    process = app.start(*SLURM, NODE, "adapter.rank=1,2,3,4")
    code, printed = ended(process)
    assert (code, states(app)) == (0, ["completed"] * 4), printed
    assert steps(app, 0)[-1] == 12 and len(steps(app, 0)) <= 13


def test_a_sweep_whose_command_was_killed_while_it_submitted_is_picked_up_and_nothing_is_submitted_twice(
    slurm: Any,
) -> None:
    app, cluster = slurm
    grid = (*SLURM, "adapter.rank=1,2,3", "hydra.launcher.array_parallelism=2")
    process = app.start(*grid, stop="1,2,3")
    waiting(app, 0, 1)
    process.kill()
    process.wait()
    before = cluster.jobs()
    (submission,) = submissions(app)
    # As if it had been killed before it could note the number, and no job had begun.
    (app.sweep_dir / ".slurm" / submission["id"] / "submission.json").write_text(
        json.dumps({**submission, "job": None})
    )
    for note in (app.sweep_dir / ".slurm" / submission["id"] / "started").iterdir():
        note.unlink()
    go(app, 0)
    wait_until(lambda: (app.root / "sweeps/s/0/result.json").exists(), "one has ended meanwhile")
    process = app.start(*grid)
    seen = read_until(process, f"trial 1: its job {submission['job']}_1 goes on (RUNNING")
    waiting(app, 2)
    go(app, 1, 2)
    code, printed = ended(process)
    assert (code, states(app)) == (0, ["completed"] * 3), seen + printed
    assert set(cluster.jobs()) == set(before) and len(submissions(app)) == 1
    assert [app.calls(number) for number in range(3)] == [1] * 3


def test_a_search_fills_each_place_at_once_and_outlives_its_controller_and_its_command(slurm: Any) -> None:
    app, cluster = slurm
    points = "[{adapter.rank: 9}, {adapter.rank: 1}, {adapter.rank: 2}, {adapter.rank: 3}, {adapter.rank: 4}]"
    arguments = (
        *SEARCH, "adapter.rank=choice(1,2,3,4,9)", f"sweep.enqueue={points}", "sweep.n_trials=5", "sweep.slots=2",
    )  # fmt: skip
    process = app.start(*arguments, stop="9")
    waiting(app, 0)
    wait_until(lambda: (app.root / "sweeps/s/2/result.json").exists(), "others do not wait for the slow one")
    process.kill()
    process.wait()
    slow = next(entry["job"] for entry in submissions(app) if entry["tasks"][0]["run_dir"].endswith("/0"))
    cluster.kill_controller()
    process = app.start(*arguments, stop="9")
    seen = read_until(process, "Slurm does not answer")
    cluster.up()
    wait_until(lambda: len(list(app.root.glob("sweeps/s/[1-4]/result.json"))) == 4, "all others are through")
    go(app, *[n for n in range(5) if (app.root / f"sweeps/s/{n}/waiting").exists()])
    code, printed = ended(process)
    assert (code, states(app)) == (0, ["completed"] * 5), seen + printed
    assert "Slurm answers again" in printed and f"trial 0: its job {slow} goes on" in printed
    assert [app.calls(number) for number in range(5)] == [1] * 5
    assert len(submissions(app)) == 5 and all(entry["job"] for entry in submissions(app))


def test_without_waiting_it_submits_and_ends_and_the_same_command_goes_on(
    slurm: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mgm_exp.cli import main

    app, cluster = slurm
    monkeypatch.setenv("SMALL_STOP", "1,2")
    assert app(*SLURM, NODE, "adapter.rank=1,2", "launch.wait=false") == 0
    assert "2 trial(s) submitted" in capfd.readouterr().out
    assert app.sweep()["status"] == "submitted"
    (submission,) = submissions(app)
    waiting(app, 0, 1)
    assert main(["status", "s", "--root", str(app.root)]) == 0
    shown = capfd.readouterr().out
    assert "submitted" in shown and f"{submission['job']}_0 RUNNING" in shown and "running" in shown
    assert app(*SLURM, NODE, "adapter.rank=1,2", "launch.wait=false") == 0, "asked again, it says the same"
    cluster.call("scancel", f"{submission['job']}_1")
    go(app, 0)
    wait_until(lambda: not cluster.call("squeue", "--noheader"), "both are over")
    monkeypatch.setenv("SMALL_STOP", "")
    assert app(*SLURM, NODE, "adapter.rank=1,2") == 0
    assert states(app) == ["completed"] * 2 and [app.calls(number) for number in range(2)] == [1, 2]
    assert main(["status", "s", "--root", str(app.root)]) == 0


def test_ctrl_c_cancels_what_waits_and_lets_the_others_save(slurm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    app, cluster = slurm
    monkeypatch.setenv("SMALL_STEPS", "6")
    monkeypatch.setenv("SMALL_HOLD", "4")
    grid = (*SLURM, NODE, "adapter.rank=1,2", "hydra.launcher.array_parallelism=1")
    process = app.start(*grid)
    wait_until(lambda: (app.root / "sweeps/s/0/steps.txt").exists(), "the first one trains")
    process.send_signal(signal.SIGINT)
    code, printed = ended(process)
    monkeypatch.delenv("SMALL_HOLD")
    assert code == 130, printed
    assert not cluster.call("squeue", "--noheader", "--states=PENDING,RUNNING")
    assert states(app) == ["interrupted"]
    assert ended(app.start(*grid))[0] == 0
    assert sorted(set(steps(app, 0))) == list(range(1, 7)) and len(steps(app, 0)) <= 7
    assert states(app) == ["completed"] * 2


def test_what_slurm_refuses_is_said_in_its_words(slurm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    app, _ = slurm
    assert app(*SLURM, "adapter.rank=1", "hydra.launcher.partition=nowhere") == 2
    assert "invalid partition specified: nowhere" in capsys.readouterr().err
    assert app(*SLURM, "adapter.rank=1", "hydra.launcher.snapshot=false") == 0, "and the next command submits"
    assert states(app) == ["completed"]
    assert f"code: {Path(__file__).parents[3]}" in (app.sweep_dir / "0" / "log.txt").read_text()
