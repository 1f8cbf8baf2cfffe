"""The processes of one stage, as seen by one of them: which one am I, and how do we agree on a few numbers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

from mgm_exp.config import Device
from mgm_exp.errors import MissingDependencyError
from mgm_exp.train.pulse import Marks

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Whoever started the processes names those that hang after launch.timeout_s; collectives give up later than that, for
# the case that nobody is left who could.
COLLECTIVE_TIMEOUT_FACTOR, COLLECTIVE_TIMEOUT_MORE_S = 1.25, 60


@dataclass(frozen=True)
class Ranks:
    """One process among ``world_size``.

    Args:
        rank: 0 writes files, prints and decides where one has to.
        world_size: Processes that train together.
        device: Where this process computes.
        marks: How far this process is, for those who watch it.
    """

    rank: int
    world_size: int
    device: torch.device
    marks: Marks = field(default_factory=Marks, compare=False, repr=False)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @classmethod
    def alone(cls, device: Device) -> Ranks:
        """The only process."""
        return cls(0, 1, _made_current(compute_device(device, 0)))

    @classmethod
    def join(cls, device: Device, timeout_s: float = 1800.0, marks: Marks | None = None) -> Ranks:
        """Joins the process group that torch's elastic launcher described in the environment."""
        import torch.distributed as dist

        timeout = timedelta(seconds=timeout_s * COLLECTIVE_TIMEOUT_FACTOR + COLLECTIVE_TIMEOUT_MORE_S)

        where = _made_current(compute_device(device, int(os.environ["LOCAL_RANK"])))
        on_gpu = where.type == "cuda"
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout, device_id=where if on_gpu else None)
        return cls(dist.get_rank(), dist.get_world_size(), where, marks or Marks())

    def leave(self) -> None:
        """Dissolves the process group."""
        if self.world_size > 1 or _in_group():
            import torch.distributed as dist

            dist.destroy_process_group()

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """The same few numbers of every process, by rank (float64); every process gets the same answer."""
        if self.world_size == 1:
            return [list(values)]
        import torch

        return self.read(self.table(torch.tensor(values, dtype=torch.float64)))

    def table(self, values: Tensor) -> Tensor:
        """(n,) numbers of this process -> (processes, n) of all, in float64 on the device: not waited for on a GPU."""
        import torch

        if self.world_size == 1:
            return values.to(torch.float64)[None]
        import torch.distributed as dist

        table = torch.zeros(self.world_size, len(values), dtype=torch.float64, device=self.device)
        table[self.rank] = values
        self.marks.tick()
        self.marks.waits = True
        dist.all_reduce(table)
        self.marks.waits = False
        self.marks.tick()
        return table

    def read(self, table: Tensor) -> list[list[float]]:
        """The numbers of a :meth:`table`, once the device has them."""
        self.marks.waits = True
        rows = [[float(value) for value in row] for row in table.tolist()]
        self.marks.waits = False
        return rows

    def gather_texts(self, texts: Sequence[str]) -> list[str]:
        """The texts of all processes, by rank."""
        if self.world_size == 1:
            return list(texts)
        import torch.distributed as dist

        everyone: list[list[str]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(everyone, list(texts))
        return [text for part in everyone for text in part]

    def barrier(self) -> None:
        """Waits for all processes."""
        self.gather([0.0])


def _in_group() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def _made_current(device: torch.device) -> torch.device:
    if device.type == "cuda":
        import torch

        torch.cuda.set_device(device)
    return device


def compute_device(device: Device, local_rank: int) -> torch.device:
    """The device that a process computes on.

    Raises:
        MissingDependencyError: A GPU is asked for and torch sees none (or fewer than processes).
    """
    import torch

    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device is Device.cpu or (device is Device.auto and available == 0):
        return torch.device("cpu")
    if local_rank >= available:
        build = torch.version.cuda or "none: this is a CPU build"
        raise MissingDependencyError(
            f"device={device.value} needs a GPU for process {local_rank}, but torch {torch.__version__} sees "
            f"{available} (its CUDA version: {build}).",
            advice="Use device=cpu, fewer devices, or install the CUDA build of torch and check nvidia-smi.",
        )
    return torch.device("cuda", local_rank)
