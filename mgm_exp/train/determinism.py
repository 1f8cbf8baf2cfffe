"""``train.deterministic``: only kernels that give the same bits every time, while a stage runs.

On the CPU a stage is bit-exact without it, given the same number of threads. On a GPU several kernels add up in the
order in which their threads happen to arrive; torch has slower ones that do not, and names an operation that has none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

# cuBLAS gives the same bits only with buffers of its own; read when its first handle is made in a process.
# https://docs.nvidia.com/cuda/cublas/#results-reproducibility
CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_VALUE = ":4096:8"


def environment(is_deterministic: bool) -> dict[str, str]:
    """What a process needs in its environment before it first computes on a GPU."""
    return {CUBLAS: os.environ.get(CUBLAS, CUBLAS_VALUE)} if is_deterministic else {}


@contextmanager
def determinism(is_deterministic: bool) -> Iterator[None]:
    """Inside, torch uses deterministic kernels only; outside, whatever was set before.

    Raises:
        RuntimeError: (by torch, inside) an operation of the model has no deterministic kernel on this device.
    """
    if not is_deterministic:
        yield
        return
    import torch

    os.environ.update(environment(True))
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
    )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before[2:]
