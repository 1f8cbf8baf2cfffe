"""Memory that a process takes above what it holds once everything is loaded, as Linux counts resident pages."""

from __future__ import annotations

import ctypes
import ctypes.util
import gc
from pathlib import Path


def peak_reset() -> float:
    """Gives back what is free, forgets the peak so far; MiB that are resident now."""
    gc.collect()
    ctypes.CDLL(ctypes.util.find_library("c")).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def above_now(base: float) -> float:
    """MiB by which the peak since :func:`peak_reset` lies above ``base``."""
    return _status("VmHWM") - base


def _status(key: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(key)
