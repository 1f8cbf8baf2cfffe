"""What the samples of a run come to: peaks, means, how long a GPU waited."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mgm_exp.config import MonitorLimitsConfig


class Summary:
    """Takes samples one after another; :meth:`as_json` gives what they come to.

    Args:
        limits: ``idle_share`` says when a GPU is idle.
    """

    def __init__(self, limits: MonitorLimitsConfig, samples: Iterable[Mapping[str, Any]] = ()) -> None:
        self._limits = limits
        self._count = 0
        self._peaks: dict[str, float] = {}
        self._sums: dict[str, tuple[float, int]] = {}
        for sample in samples:
            self.add(sample)

    def add(self, sample: Mapping[str, Any]) -> None:
        """Takes one more sample in."""
        self._count += 1
        for key in ("memory_gib", "process_memory_gib", "process_cpu"):
            self._peak(f"{key}_peak", sample.get(key))
        self._mean("cpu_mean", sample.get("cpu"))
        for name, disk in (sample.get("disks") or {}).items():
            self._peak(f"disk_free_gib_least/{name}", -disk["free_gib"])
        for gpu in sample.get("gpus") or ():
            self._peak("gpu_memory_gib_peak", gpu["memory_used_gib"])
            self._peak("gpu_power_w_peak", gpu.get("power_w"))
            self._peak("gpu_temperature_c_peak", gpu.get("temperature_c"))
            if sample.get("stage") is not None and gpu.get("utilization") is not None:
                self._mean("gpu_utilization_mean", gpu["utilization"])
                self._mean("gpu_idle_share", float(gpu["utilization"] < self._limits.idle_share))

    def as_json(self) -> dict[str, Any]:
        """``samples, cpu_mean, memory_gib_peak, process_memory_gib_peak, process_cpu_peak, disk_free_gib_least{}``, and
        of GPUs ``gpu_memory_gib_peak, gpu_power_w_peak, gpu_temperature_c_peak``, with ``gpu_utilization_mean`` and
        ``gpu_idle_share`` of the time in which a stage trained. Only what was read."""
        least = {key.partition("/")[2]: round(-value, 3) for key, value in self._peaks.items() if "/" in key}
        found: dict[str, Any] = {"samples": self._count}
        found |= {key: round(total / n, 4) for key, (total, n) in self._sums.items()}
        found |= {key: round(value, 3) for key, value in self._peaks.items() if "/" not in key}
        return found | ({"disk_free_gib_least": least} if least else {})

    def _peak(self, key: str, value: float | None) -> None:
        if value is not None:
            self._peaks[key] = max(value, self._peaks.get(key, value))

    def _mean(self, key: str, value: float | None) -> None:
        if value is not None:
            total, n = self._sums.get(key, (0.0, 0))
            self._sums[key] = total + value, n + 1
