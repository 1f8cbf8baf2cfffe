"""Agents that were started beforehand take part in what the experiment posts, and end with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mgm_exp.store import write_atomic
from mgm_exp.train import run_stage
from mgm_exp.train.board import SESSION, Board, board_of_experiment, post, wait_for_work
from mgm_exp.train.launch_folder import LaunchFacts, LaunchFolder

from .test_launch import steps_of

PODS = {"VC_MAIN_HOSTS": "127.0.0.1", "VC_NODE_HOSTS": "localhost"}


@pytest.fixture
def pods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment of the first pod of two; the board."""
    for name, value in PODS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MGM_EXP_BOARD", str(tmp_path / "board"))
    monkeypatch.delenv(SESSION, raising=False)
    return tmp_path / "board"


def agent(board: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mgm_exp.train.agent", "--wait", str(board)]
    environment = {**os.environ, "VC_TASK_INDEX": "0"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_an_agent_takes_part_in_what_is_posted_and_ends_with_the_experiment(pods: Path, make_job: Any) -> None:
    waiting = agent(pods)
    with board_of_experiment():
        assert waiting.stdout is not None
        assert "the experiment is there" in waiting.stdout.readline()
        launch = LaunchFolder.attempt(pods.parent, 0)
        launch.begin(make_job(), LaunchFacts(("127.0.0.1", "localhost"), 1, ("127.0.0.1", 1), "x", 60.0))
        write_atomic(launch.alive, "x 1")
        launch.ask_to_end("this is only a test")
        post(launch)
    said, _ = waiting.communicate(timeout=120)
    assert waiting.returncode == 0, said
    assert "ends: it was asked to" in said


def test_what_an_earlier_start_left_behind_is_not_trusted(pods: Path) -> None:
    with Board(pods) as old:
        pass
    assert (pods / old.session / "done").exists()
    assert wait_for_work(pods, 1, comes_s=0.5) == 1, "it was over before this agent came"


def test_an_agent_gives_up_when_the_experiment_falls_silent(pods: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ThreadPoolExecutor(1) as pool, Board(pods) as board:
        board._heartbeat.stop()  # as if its process had died, once the agent has heard of it
        ended = pool.submit(wait_for_work, pods, 1, comes_s=60, gone_s=0.5)
        while "the experiment is there" not in capsys.readouterr().out:
            board._beat()
            time.sleep(0.05)
        assert ended.result(timeout=60) == 1


def test_an_agent_whose_machine_is_wanted_back_says_so(pods: Path) -> None:
    waiting = agent(pods)
    with board_of_experiment():
        assert waiting.stdout is not None
        assert "the experiment is there" in waiting.stdout.readline()
        waiting.send_signal(signal.SIGTERM)
        assert waiting.wait(60) == 130


def test_there_is_no_board_where_nobody_waits(pods: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SESSION, "of the sweep that started this process")
    with board_of_experiment():
        assert not pods.exists()
    monkeypatch.delenv(SESSION)
    monkeypatch.delenv("VC_NODE_HOSTS")
    with board_of_experiment():
        assert not pods.exists()


@pytest.mark.slow
def test_a_stage_over_two_pods(pods: Path, make_job: Any) -> None:
    settings = {"devices": 2, "steps": 3}
    waiting = agent(pods)
    with board_of_experiment():
        for name in ("first", "second"):
            job = make_job(name=name, **settings)
            run_stage(job)
            facts = LaunchFacts.read(LaunchFolder.newest(job.work).facts)
            assert facts.names == ("127.0.0.1", "localhost")
    said, _ = waiting.communicate(timeout=120)
    assert waiting.returncode == 0, said
    alone = make_job(name="alone", steps=3)
    run_stage(alone)
    assert steps_of(job) == [pytest.approx(step, rel=1e-5) for step in steps_of(alone)]
