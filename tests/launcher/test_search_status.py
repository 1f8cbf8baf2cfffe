"""``mgm-exp status`` and ``dashboard`` on a search."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
import time
import urllib.request
from typing import Any

import pytest

from mgm_exp.cli import main
from mgm_exp.study_table import in_short, rows_of

SEARCH = ("-m", "hydra/sweeper=mgm_optuna", "sweep.name=mine")


@pytest.fixture
def searched(app: Any) -> Any:
    points = "[{adapter.rank: 4}, {adapter.rank: 8}, {adapter.rank: 12}]"
    code = app(*SEARCH, "adapter.rank=4,8,12", f"sweep.enqueue={points}", "sweep.n_trials=3", fail="4:oom,8:failed")
    assert code == 1
    return app


def test_the_table_says_how_each_trial_ended_and_why(searched: Any, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["status", "mine", "--root", str(searched.root)]) == 0
    output = capsys.readouterr().out
    assert "3 trials (1 infeasible, 1 failed, 1 completed); best: trial 2 (rank=12) with 0.6000" in output
    assert "rank 4 needs more memory" in output and "rank 8 was told to fail" in output
    assert main(["status", "--root", str(searched.root)]) == 0
    assert "best: trial 2" in capsys.readouterr().out
    assert main(["status", "mine", "--watch", "--root", str(searched.root)]) == 0
    assert "best" in capsys.readouterr().out
    assert [row.state for row in rows_of(searched.sweep_dir)] == ["infeasible", "failed", "completed"]


def test_a_running_search_shows_what_runs_and_where(app: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    process = app.start(*SEARCH, "adapter.rank=4,8", "sweep.n_trials=2", stop="4,8")
    folder = app.waits_in("sweeps/*/0", process)
    try:
        assert main(["status", "mine", "--root", str(app.root)]) == 0
        assert "running" in capsys.readouterr().out
    finally:
        process.kill()
        process.communicate()
    assert main(["status", str(folder.parent), "--root", str(app.root)]) == 0
    assert "running" not in capsys.readouterr().out


def test_short_names_are_used_where_they_are_clear() -> None:
    assert (
        in_short({"adapter.rank": 8, "train.lr": 0.00123456, "_x": 1, "data": "raw"}) == "rank=8 lr=0.001235 data=raw"
    )
    assert in_short({"train.lr": 1e-3, "train.align.lr": 2e-3}) == "train.lr=0.001 train.align.lr=0.002"
    assert in_short({"train.freeze_connector": True, "data.path": None}) == "freeze_connector=true path=null"


def test_the_dashboard_says_what_to_install(
    searched: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["dashboard", "mine", "--root", str(searched.root)]) == 2
    assert "mgm-exp[search]" in capsys.readouterr().err
    assert main(["dashboard", "nobody", "--root", str(searched.root)]) == 2
    assert "There are: mine" in capsys.readouterr().err


def test_the_dashboard_serves_the_study(searched: Any) -> None:
    pytest.importorskip("optuna_dashboard", reason="optuna-dashboard is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "mgm_exp.cli",
        "dashboard",
        "mine",
        "--root",
        str(searched.root),
        "--port",
        str(port),
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 300
            while True:
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies", timeout=5) as answer:
                        content = answer.read().decode()
                    break
                except OSError:
                    assert process.poll() is None and time.monotonic() < deadline
                    time.sleep(0.1)
            assert '"mine"' in content
        finally:
            process.terminate()
