"""A folder of its own for each command."""

from __future__ import annotations

from pathlib import Path

import pytest

from .command_line import Command


@pytest.fixture
def command(tmp_path: Path) -> Command:
    return Command(tmp_path / "outputs")
