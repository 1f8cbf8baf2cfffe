"""The command line as a user types it, on small settings of the real components.

What is not killed runs in this process: a new one would import torch and transformers for longer than it works.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
# A few images, steps and questions: everything runs once.
FAST = ["debug=fast", "device=cpu"]


class Command:
    """``python -m mgm_exp ...`` with its results below one folder."""

    def __init__(self, root: Path, store: Path | None = None) -> None:
        self.root = root
        self.store = store or root / "store"

    def arguments(self, *overrides: str) -> list[str]:
        return [*FAST, f"paths.root={self.root}", f"paths.store={self.store}", *overrides]

    def argv(self, *overrides: str) -> list[str]:
        """The command line of a process of its own."""
        return [sys.executable, "-m", "mgm_exp", *self.arguments(*overrides)]

    def main(self, arguments: list[str]) -> int:
        from mgm_exp.command import main

        return main(arguments)

    def run(self, *overrides: str) -> subprocess.CompletedProcess[str]:
        """Runs in this process, with its environment and from another folder."""
        arguments, out, err = self.arguments(*overrides), io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.chdir(self.root.parent)
            patch.setenv("COLUMNS", "120")
            patch.setenv("PYTHONPATH", str(REPOSITORY))
            code = self.main(arguments)
        return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())

    def environment(self) -> dict[str, str]:
        drop = ("WANDB_", "HYDRA_", "RANK", "WORLD_SIZE", "MASTER_")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(drop)}
        return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "COLUMNS": "120"}

    def start(self, *overrides: str) -> subprocess.Popen[str]:
        """Starts a process of its own."""
        return subprocess.Popen(
            self.argv(*overrides),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            cwd=self.root.parent,
        )

    def runs(self, name: str = "*") -> list[Path]:
        """Run folders, oldest first."""
        return sorted((self.root / "runs").glob(f"{name}/*/"))


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def steps(run: Path) -> list[tuple[str, int]]:
    return [(row["stage"], row["step"]) for row in rows(run / "metrics.jsonl") if "event" not in row]
