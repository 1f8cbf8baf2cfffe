"""The command line as a user types it, in processes of its own, on small settings of the real components."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
# A few images, steps and questions: everything runs once.
FAST = ["debug=fast", "device=cpu"]


class Command:
    """``python -m mgm_exp ...`` with its results below one folder."""

    def __init__(self, root: Path, store: Path | None = None) -> None:
        self.root = root
        self.store = store or root / "store"

    def argv(self, *overrides: str) -> list[str]:
        return [
            sys.executable,
            "-m",
            "mgm_exp",
            *FAST,
            f"paths.root={self.root}",
            f"paths.store={self.store}",
            *overrides,
        ]

    def environment(self) -> dict[str, str]:
        drop = ("WANDB_", "HYDRA_", "RANK", "WORLD_SIZE", "MASTER_")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(drop)}
        return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "COLUMNS": "120"}

    def run(self, *overrides: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.argv(*overrides),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            cwd=self.root.parent,
        )

    def start(self, *overrides: str) -> subprocess.Popen[str]:
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
