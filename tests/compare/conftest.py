"""The sweep that several tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_folders import write_demo_sweep


@pytest.fixture
def demo_sweep(tmp_path: Path) -> Path:
    """lora_r8, lora_r16 (tied), full (better), and a trial that failed."""
    return write_demo_sweep(tmp_path / "sweeps" / "ranks")
