"""How agents are started elsewhere, and that what they are started with reaches them whole."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mgm_exp.store import write_atomic
from mgm_exp.train.agent import AliveWatch
from mgm_exp.train.agents import SlurmAgents, remote_command
from mgm_exp.train.attached import attached
from mgm_exp.train.launch_folder import LaunchFacts, LaunchFolder


def test_a_remote_shell_is_given_one_line_that_any_path_survives(tmp_path: Path) -> None:
    folder = tmp_path / "it's here; $(touch x)"
    folder.mkdir()
    line = remote_command(folder, 3, folder, f"{folder}:b")
    shown = line.replace(f"exec env {shlex.quote(f'PYTHONPATH={folder}:b')}", "pwd; exec printf '%s\\n'")
    assert shown != line
    done = subprocess.run(["sh", "-c", shown], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == [
        str(folder), sys.executable, "-m", "mgm_exp.train.agent", str(folder), "3", "--stdin",
    ]  # fmt: skip
    assert list(folder.iterdir()) == []


def test_a_slurm_step_has_one_task_on_each_node(tmp_path: Path, make_job: Callable[..., Any]) -> None:
    launch = LaunchFolder.attempt(tmp_path, 0)
    ((command, _),) = SlurmAgents(launch, LaunchFacts(("a", "b", "c"), 2, ("a", 1), "x", 1.0))._commands().values()
    step = command[command.index("srun") :]
    assert {"--overlap", "--nodes=3", "--ntasks=3", "--ntasks-per-node=1", "--kill-on-bad-exit=1"} <= set(step)
    assert step[-2:] == ["mgm_exp.train.agent", str(launch.folder)]


def test_a_program_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    inner = f"import os, time; open({str(mark)!r} + '.new', 'w').write(str(os.getpid())); "
    inner += f"os.rename({str(mark)!r} + '.new', {str(mark)!r}); time.sleep(600)"
    outer = (
        "import subprocess, sys, time; from mgm_exp.train.attached import attached; "
        f"subprocess.Popen(attached([sys.executable, '-c', {inner!r}])); time.sleep(600)"
    )
    starter = subprocess.Popen([sys.executable, "-c", outer], cwd=Path(__file__).parents[2])
    try:
        assert _until(mark.exists)
    finally:
        starter.kill()
        starter.wait(60)
    pid = int(mark.read_text())
    assert _until(lambda: not _runs(pid))


def test_a_program_that_is_not_there_is_named() -> None:
    done = subprocess.run(attached(["no-such-program"]), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "no-such-program: No such file" in done.stderr


def test_only_the_own_starter_counts_as_a_sign_of_life(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    watch = AliveWatch(alive, "mine")
    began = time.monotonic()
    for number in range(20):
        write_atomic(alive, f"another {number}")
        time.sleep(0.01)
        assert watch.silent_s() >= time.monotonic() - began - 0.05
    write_atomic(alive, "mine 1")
    assert watch.silent_s() < time.monotonic() - began


def _until(is_so: Callable[[], bool], timeout_s: float = 60) -> bool:
    deadline = time.monotonic() + timeout_s
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.02)
    return is_so()


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_what_is_passed_on_holds_no_secret() -> None:
    from mgm_exp.record import is_secret_name
    from mgm_exp.train.launch import _PASSED_ON

    names = ("WANDB_API_KEY", "HF_TOKEN", "HF_HUB_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD")
    assert all(is_secret_name(name) for name in names)
    assert [name for name in (*names, *os.environ) if is_secret_name(name) and name.startswith(_PASSED_ON)] == []
