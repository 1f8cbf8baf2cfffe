"""The command line with a small task, in this process or in one of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("small_task.py")


def python_path() -> str:
    """This repository first, for processes of their own."""
    inherited = [
        path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != str(REPOSITORY)
    ]
    return os.pathsep.join([str(REPOSITORY), *inherited])


def _small_task() -> Callable[..., dict[str, Any]]:
    spec = importlib.util.spec_from_file_location("small_task", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.small_task  # type: ignore[no-any-return]


def _here(arguments: tuple[str, ...]) -> list[str]:
    """A sweep's trials run in its own process where no launcher is given: what starting workers costs is saved."""
    is_given = any(item.startswith("hydra/launcher=") for item in arguments)
    return [*arguments, *([] if is_given else ["hydra/launcher=basic"])]


class App:
    """``python -m mgm_exp`` with the small task, its results below ``root``."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.monkeypatch = monkeypatch
        self.task = _small_task()

    def __call__(self, *arguments: str, fail: str = "") -> int:
        """Runs a command line in this process; the exit code."""
        from mgm_exp.command import main

        self.monkeypatch.setenv("SMALL_FAIL", fail)
        child = [sys.executable, str(PROGRAM)]
        self.monkeypatch.setenv("PYTHONPATH", python_path())
        return main([*_here(arguments), f"paths.root={self.root}"], task=self.task, child=child)

    def start(self, *arguments: str, stop: str = "", fail: str = "") -> subprocess.Popen[str]:
        """Starts a command line in a process of its own."""
        environment = os.environ | {"PYTHONPATH": python_path(), "SMALL_STOP": stop, "SMALL_FAIL": fail}
        return subprocess.Popen(
            [sys.executable, str(PROGRAM), *_here(arguments), f"paths.root={self.root}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=self.root.parent,
        )

    def waits_in(self, pattern: str, process: subprocess.Popen[str], timeout_s: float = 300) -> Path:
        """The folder below the root in which the task says that it waits."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for marker in self.root.glob(f"{pattern}/waiting"):
                return marker.parent
            if process.poll() is not None:
                raise AssertionError(f"the process ended with {process.returncode}: {process.communicate()[0]}")
            time.sleep(0.02)
        raise AssertionError("the task did not come to the place where it waits")

    @property
    def sweep_dir(self) -> Path:
        """The only sweep's folder."""
        (folder,) = (self.root / "sweeps").iterdir()
        return folder

    def sweep(self) -> dict[str, Any]:
        """The only sweep's ``sweep.json``."""
        return json.loads((self.sweep_dir / "sweep.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]

    def calls(self, number: int) -> int:
        """How often the task was called for a trial."""
        file = self.sweep_dir / str(number) / "calls.txt"
        return len(file.read_text(encoding="utf-8").splitlines()) if file.exists() else 0


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> App:
    monkeypatch.setenv("COLUMNS", "160")
    return App(tmp_path / "out", monkeypatch)
