"""File systems of their own for the tests of the store."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture
def disk_path() -> Iterator[Path]:
    """A folder on the disk."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder).resolve()


@pytest.fixture
def tmp_path(disk_path: Path) -> Iterator[Path]:
    """In memory where that is possible: these tests fsync thousands of times, and need no disk for what they show."""
    if not os.access(SHARED_MEMORY, os.W_OK):
        yield disk_path
        return
    folder = Path(tempfile.mkdtemp(dir=SHARED_MEMORY, prefix="store-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def other_device(tmp_path: Path, disk_path: Path) -> Path:
    """A folder on another file system than ``tmp_path``."""
    if tmp_path.stat().st_dev == disk_path.stat().st_dev:
        pytest.skip("no second file system that can be written (/dev/shm)")
    return disk_path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
