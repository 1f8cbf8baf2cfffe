"""What this machine has left: disk, file entries and shared memory of where a run lies, and memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from mgm_exp.doctor.facts import Fact

GIB = 1 << 30
SHARED_MEMORY = Path("/dev/shm")


def machine_facts(folder: Path) -> Iterator[Fact]:
    """``machine.*`` now, which may be later than the failure, and another machine than the run's.

    Args:
        folder: The run's.
    """
    yield from _file_system("disk", folder)
    yield from _file_system("shm", SHARED_MEMORY)
    memory = _available_gib()
    if memory is not None:
        yield Fact("machine.memory_free_gib", memory, "/proc/meminfo", f"this machine has {memory:.1f} GiB free now")


def _file_system(name: str, folder: Path) -> Iterator[Fact]:
    try:
        found = os.statvfs(folder)
    except OSError:
        return
    free, total = found.f_bavail * found.f_frsize / GIB, found.f_blocks * found.f_frsize / GIB
    told = f"{folder} has {free:.1f} of {total:.1f} GiB free now"
    yield Fact(f"machine.{name}_free_gib", free, str(folder), told)
    yield Fact(f"machine.{name}_gib", total, str(folder), told)
    if found.f_files:
        share = found.f_favail / found.f_files
        told = f"{folder} has {found.f_favail:,} of {found.f_files:,} file entries (inodes) free now"
        yield Fact(f"machine.{name}_entries_share", share, str(folder), told)


def _available_gib() -> float | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    kib = next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
    return None if kib is None else kib / (1 << 20)
