"""Peak memory of this process since a stage began."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

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
