"""Memory of this process: its peak since a stage began, its growth, and what is known when it has ended."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mgm_exp.store import write_atomic

if TYPE_CHECKING:
    import torch

GIB = 1024**3


class PeakMemory:
    """Largest memory since it was made: what torch allocated on the GPU; on the CPU the process's resident memory.

    The kernel keeps the resident peak of the whole process; writing 5 to ``/proc/self/clear_refs`` resets it (proc(5)).
    Where that is not allowed, the largest of the samples taken by :meth:`gib` counts.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._largest = 0.0
        self._is_reset = False
        if device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(device)
        else:
            try:
                Path("/proc/self/clear_refs").write_text("5")
                self._is_reset = True
            except OSError:
                self._is_reset = False

    def gib(self) -> float:
        """GiB (1024³ bytes)."""
        if self._device.type == "cuda":
            import torch

            return torch.cuda.max_memory_allocated(self._device) / GIB
        self._largest = max(self._largest, _status_kib("VmHWM" if self._is_reset else "VmRSS") * 1024 / GIB)
        return self._largest


def _status_kib(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), 0)


# -- a leak, before it kills -----------------------------------------------------------------------------------------

# Steps that a trend is drawn through, after so many that are not looked at (caches fill up).
TREND_STEPS, SETTLING_STEPS = 200, 50
# What counts as growth: so much over the window, in so straight a line (correlation with the step).
LEAST_GROWTH_GIB, STRAIGHT = 0.05, 0.9


@dataclass(frozen=True)
class Leak:
    """Memory that grows step by step.

    Args:
        where: ``host memory`` or ``GPU memory``.
        mib_per_step: How fast.
        gib, limit_gib: How much is used, and how much there is.
        steps_left: Until the limit is reached.
    """

    where: str
    mib_per_step: float
    gib: float
    limit_gib: float
    steps_left: int

    def __str__(self) -> str:
        return (
            f"{self.where} grows by {self.mib_per_step:.2f} MiB a step: {self.gib:.2f} of {self.limit_gib:.1f} GiB are "
            f"used, and it ends in about {self.steps_left:,} steps"
        )


class MemoryGrowth:
    """A linear trend of the memory in use, of the process that uses most of it."""

    def __init__(self, limits_gib: Mapping[str, float]) -> None:
        self._limits = dict(limits_gib)
        self._samples: dict[str, deque[float]] = {where: deque(maxlen=TREND_STEPS) for where in self._limits}
        self._seen = 0

    @classmethod
    def of(cls, device: torch.device) -> MemoryGrowth:
        """Of this machine's memory, and of the GPU's."""
        limits = {"host memory": host_limit_gib()}
        if device.type == "cuda":
            import torch

            limits["GPU memory"] = torch.cuda.get_device_properties(device).total_memory / GIB
        return cls(limits)

    def in_use(self, device: torch.device) -> list[float]:
        """GiB in use by this process, in the order of the limits; asks no device."""
        found = [resident_gib()]
        if device.type == "cuda":
            import torch

            found.append(torch.cuda.memory_allocated(device) / GIB)
        return found

    def note(self, in_use: Sequence[float], steps_to_go: int) -> Leak | None:
        """Takes one step's numbers in.

        Args:
            in_use: GiB, in the order of the limits.
            steps_to_go: A leak that ends later than the stage is none.

        Returns:
            The leak, at most once a window.
        """
        self._seen += 1
        if self._seen <= SETTLING_STEPS:
            return None
        for (where, samples), gib in zip(self._samples.items(), in_use, strict=True):
            samples.append(gib)
            if len(samples) < TREND_STEPS or (self._seen - SETTLING_STEPS) % TREND_STEPS:
                continue
            slope, correlation = trend(list(samples))
            if slope * TREND_STEPS < LEAST_GROWTH_GIB or correlation < STRAIGHT:
                continue
            steps_left = max(0, int((self._limits[where] - gib) / slope))
            if steps_left < steps_to_go:
                return Leak(where, slope * 1024, gib, self._limits[where], steps_left)
        return None


def trend(values: Sequence[float]) -> tuple[float, float]:
    """Slope a step of the least-squares line through values, and their correlation with the step (0 if constant)."""
    n = len(values)
    middle, mean = (n - 1) / 2, sum(values) / n
    xx = sum((i - middle) ** 2 for i in range(n))
    xy = sum((i - middle) * (value - mean) for i, value in enumerate(values))
    yy = sum((value - mean) ** 2 for value in values)
    return xy / xx, xy / (xx * yy) ** 0.5 if yy > 0 else 0.0


def resident_gib() -> float:
    """Resident memory of this process now; 0 where there is no /proc."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / GIB
    except (OSError, IndexError, ValueError):
        return 0.0


def host_limit_gib() -> float:
    """What the kernel lets this process have: the machine's memory, or its control group's where that is less."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return min(limits) / GIB


# -- when it has ended -----------------------------------------------------------------------------------------------


def write_summary(path: Path, device: torch.device, error: BaseException) -> None:
    """Writes down what memory was used for when it ended."""
    lines = [str(error), "", f"resident: {resident_gib():.3f} GiB of {host_limit_gib():.1f} GiB", ""]
    if device.type == "cuda":
        import torch

        lines.append(torch.cuda.memory_summary(device))
    write_atomic(path, "\n".join(lines))
