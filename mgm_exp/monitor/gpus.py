"""The run's GPUs, read through NVML: it takes no memory on them and does not wait for what they compute."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

GIB = 2**30
# Where an NVIDIA driver shows itself, on Linux and inside Windows (WSL).
_DRIVER = ("/dev/nvidiactl", "/dev/dxg")


class Gpus:
    """Handles of GPUs; :func:`open_gpus` makes it."""

    def __init__(self, nvml: Any, handles: list[Any]) -> None:
        self._nvml, self._handles = nvml, handles

    def __len__(self) -> int:
        return len(self._handles)

    def sample(self) -> list[dict[str, Any]]:
        """For each GPU ``index`` (in the run), ``memory_used_gib, memory_total_gib``, ``utilization`` (0..1, share of
        the last moments in which anything ran), ``power_w, temperature_c``; null where the GPU does not say."""
        return [self._one(index, handle) for index, handle in enumerate(self._handles)]

    def _one(self, index: int, handle: Any) -> dict[str, Any]:
        nvml = self._nvml
        memory = self._said(lambda: nvml.nvmlDeviceGetMemoryInfo(handle))  # none where it is the machine's
        busy = self._said(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        power = self._said(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        return {
            "index": index,
            "memory_used_gib": None if memory is None else round(memory.used / GIB, 3),
            "memory_total_gib": None if memory is None else round(memory.total / GIB, 3),
            "utilization": None if busy is None else busy / 100,
            "power_w": None if power is None else round(power / 1000, 1),
            "temperature_c": self._said(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
        }

    def _said(self, ask: Any) -> Any:
        """What the driver answers; None where this GPU (or instance of one) has no such reading."""
        try:
            return ask()
        except self._nvml.NVMLError:
            return None

    def close(self) -> None:
        """Lets go of the driver."""
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()


def open_gpus(devices: int) -> tuple[Gpus | None, str | None]:
    """The GPUs that a run of so many processes takes on this machine: the first of those that it may see.

    Returns:
        The GPUs, or None where there are none; and why they cannot be read, if so.
    """
    visible = _visible()
    if visible == [] or not any(Path(path).exists() for path in _DRIVER):
        return None, None
    if importlib.util.find_spec("pynvml") is None:
        return None, "GPUs are not sampled: pip install 'mgm-exp[monitor]' (nvidia-ml-py)"
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return None, f"GPUs are not sampled: {error}"
    try:
        handles = list(islice(_handles(pynvml, visible), devices))
    except pynvml.NVMLError as error:
        pynvml.nvmlShutdown()
        return None, f"GPUs are not sampled: {error} (CUDA_VISIBLE_DEVICES={','.join(visible or ())})"
    return Gpus(pynvml, handles), None


def _visible() -> list[str] | None:
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return None
    return [name.strip() for name in given.split(",") if name.strip() not in ("", "-1")]


def _handles(nvml: Any, visible: list[str] | None) -> Iterator[Any]:
    """By number, or by UUID where CUDA was given that."""
    for name in visible if visible is not None else map(str, range(nvml.nvmlDeviceGetCount())):
        yield nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else nvml.nvmlDeviceGetHandleByUUID(name)
