"""Prometheus and its tools as they are installed here: Debian's packages prometheus and prometheus-alertmanager."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

needs_prometheus = pytest.mark.skipif(
    not all(shutil.which(name) for name in ("prometheus", "promtool", "prometheus-alertmanager", "amtool")),
    reason="prometheus and prometheus-alertmanager are not installed (Debian's packages)",
)


def said_by(*command: str, folder: Path) -> str:
    """The output of a tool, which must be content."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
