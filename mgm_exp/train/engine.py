"""Engines: how gradients become an update. One small interface; this file holds plain PyTorch.

    for batch in micro_batches:
        loss = engine.accumulate(batch, normalizer, last=...)     # forward and backward
    update = engine.update(lr_factor)                              # all-reduce is done; clip, step, zero

The sum of the returned losses over micro-batches and processes is the loss of the optimizer step: the caller chooses
the normalizer (how many supervised tokens the global batch holds) so that nothing is averaged twice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from mgm_exp.config import Precision
from mgm_exp.train.job import StageSettings
from mgm_exp.train.optimizer import set_learning_rates
from mgm_exp.train.ranks import Ranks

if TYPE_CHECKING:
    from torch.optim import Optimizer

Batch = Mapping[str, Any]
# State of what an adapter does around updates.
_AROUND = "around_updates.safetensors"
COMPUTE_DTYPE = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}


@dataclass(frozen=True)
class Update:
    """What became of one optimizer step.

    Args:
        applied: False where the gradient was not finite: nothing was changed.
        grad_norm: L2 norm of the whole gradient before clipping; not finite where nothing was applied.
        loss_scale: The fp16 loss scale that the gradient was computed with; None in other precisions.
    """

    applied: bool
    grad_norm: float
    loss_scale: float | None = None


class AroundUpdates(Protocol):
    """What an adapter does around every update, the same on every process; gradients are whole and unscaled."""

    def before_update(self) -> None:
        """May add to the gradients, before they are clipped."""

    def after_update(self, *, applied: bool) -> None:
        """Called while the gradients are still there."""

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Plain values and tensors for a checkpoint."""

    def load_state(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Puts back what :meth:`state` gave."""


class Engine(ABC):
    """Turns micro-batches into updates of the trainable parameters of one module."""

    name: str
    ranks: Ranks
    trainable: dict[str, nn.Parameter]

    @property
    @abstractmethod
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups (learning rates are set there)."""

    @abstractmethod
    def accumulate(self, batch: Batch, normalizer: float, *, last: bool) -> Tensor:
        """Forward and backward of one micro-batch.

        Args:
            batch: On this process's device.
            normalizer: What the summed loss is divided by.
            last: Whether this is the last micro-batch of the step on this process (gradients are exchanged then).

        Returns:
            The detached loss of this micro-batch (its share of the step's loss), a scalar on the device.
        """

    @abstractmethod
    def update(self, lr_factor: float) -> Update:
        """Clips, applies one AdamW step at ``lr_factor`` of the peak rates, and clears the gradients.

        Nothing is applied when the gradient is not finite on any process.
        """

    @abstractmethod
    def save(self, folder: Path) -> dict[str, Any]:
        """Writes weights and optimizer state into ``folder`` (called by all processes); returns plain extra state."""

    @abstractmethod
    def load(self, folder: Path, extra: dict[str, Any]) -> None:
        """Restores what :meth:`save` wrote; the folder has been verified."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What ran, for the record."""

    def gathered(self, parameters: list[nn.Parameter]) -> AbstractContextManager[None]:
        """While it is open, these parameters are whole on every process (they may be sharded otherwise)."""
        return nullcontext()

    def master(self, name: str) -> Tensor:
        """The full-precision value that the optimizer keeps of a trainable parameter (called by all processes)."""
        return self.trainable[name].detach()

    def resident(self, parameter: nn.Parameter) -> Tensor:
        """What this process holds of a parameter: all of it, or its shard."""
        return parameter.detach()


def poisoned_if_not_finite(loss: Tensor) -> Tensor:
    """The same loss, but its gradient is NaN where the loss is not finite; finite values pass bit for bit.

    An infinite loss may have a finite gradient. This makes every process see such a step as not finite, without
    waiting for the device.
    """
    return loss * (loss.detach() * 0 + 1)


class PlainEngine(Engine):
    """Plain PyTorch: one process, or several with DistributedDataParallel.

    Trained parameters are fp32; in bf16 and fp16 the frozen ones stay in half precision and the forward pass runs
    under autocast. fp16 scales the loss dynamically (Micikevicius et al., arXiv 1710.03740).

    Args:
        module: Its forward is ``(batch, normalizer) -> loss``.
        trainable: Name -> parameter of all that is trained.
        optimizer: Over exactly these.
        settings: Clipping and precision.
        ranks: This process.
        around_updates: What an adapter does before and after each of them; None: nothing.
    """

    def __init__(
        self,
        module: nn.Module,
        trainable: dict[str, nn.Parameter],
        optimizer: Optimizer,
        settings: StageSettings,
        ranks: Ranks,
        *,
        initial_loss_scale: float = 2.0**16,
        around_updates: AroundUpdates | None = None,
    ) -> None:
        self.name = "pytorch"
        self.around_updates = around_updates
        self.trainable, self.ranks, self.optimizer = trainable, ranks, optimizer
        self.max_grad_norm = settings.max_grad_norm
        self.dtype = COMPUTE_DTYPE[settings.precision]
        self.scaler = torch.amp.GradScaler(  # type: ignore[attr-defined]
            ranks.device.type, init_scale=initial_loss_scale, enabled=settings.precision is Precision.fp16
        )
        self.module = self._parallel(module) if ranks.world_size > 1 else module

    def _parallel(self, module: nn.Module) -> nn.Module:
        # All processes built the same weights from the same files and seed: broadcasting gigabytes again is not needed.
        return nn.parallel.DistributedDataParallel(
            module, forward_sync_buffers=False, init_sync=False, gradient_as_bucket_view=True
        )

    @property
    def groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def accumulate(self, batch: Batch, normalizer: float, *, last: bool) -> Tensor:
        with self._exchange(last):
            with torch.autocast(self.ranks.device.type, self.dtype, enabled=self.dtype is not torch.float32):
                loss = self.module(batch, normalizer)
            # DistributedDataParallel averages over processes, the step's loss is a sum over them
            scaled = poisoned_if_not_finite(loss) * self.ranks.world_size
            self.scaler.scale(scaled).backward()
        return loss.detach().float()

    def _exchange(self, last: bool) -> AbstractContextManager[Any]:
        if last or self.ranks.world_size == 1:
            return nullcontext()
        assert isinstance(self.module, nn.parallel.DistributedDataParallel)
        return self.module.no_sync()

    def update(self, lr_factor: float) -> Update:
        set_learning_rates(self.groups, lr_factor)
        scale = self.scaler.get_scale() if self.scaler.is_enabled() else None
        self.scaler.unscale_(self.optimizer)
        if self.around_updates is not None:
            self.around_updates.before_update()
        parameters = [parameter for parameter in self.trainable.values() if parameter.grad is not None]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])  # type: ignore[misc]
        grad_norm = float(norm)
        is_finite = grad_norm == grad_norm and abs(grad_norm) != float("inf")
        if is_finite:
            if self.max_grad_norm > 0:
                nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
            self.scaler.step(self.optimizer)
        if self.around_updates is not None:
            self.around_updates.after_update(applied=is_finite)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return Update(is_finite, grad_norm, scale)

    def save(self, folder: Path) -> dict[str, Any]:
        """``trainable.safetensors`` and ``optimizer.safetensors``, written by the first process (all hold the same)."""
        values, tensors = self.around_updates.state() if self.around_updates is not None else ({}, {})
        if self.ranks.is_first:
            from safetensors.torch import save_file

            save_file({name: _for_disk(p) for name, p in self.trainable.items()}, folder / "trainable.safetensors")
            save_file(dict(self._optimizer_tensors()), folder / "optimizer.safetensors")
            if tensors:
                save_file({name: _for_disk(tensor) for name, tensor in tensors.items()}, folder / _AROUND)
        return {"scaler": self.scaler.state_dict(), **({"around_updates": values} if values else {})}

    def _optimizer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.trainable.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                yield f"{key}/{name}", _for_disk(value)

    def load(self, folder: Path, extra: dict[str, Any]) -> None:
        from safetensors.torch import load_file

        device = self.ranks.device
        weights = load_file(folder / "trainable.safetensors", device="cpu")
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(weights.pop(name))
        assert not weights, f"the checkpoint holds tensors that are not trained: {sorted(weights)[:3]}"
        state: dict[str, dict[str, Tensor]] = {}
        for key, value in load_file(folder / "optimizer.safetensors", device="cpu").items():
            what, _, name = key.partition("/")
            # torch keeps the step counter on the CPU (AdamW without capturable)
            state.setdefault(name, {})[what] = value if what == "step" else value.to(device)
        self.optimizer.state.clear()
        for name, values in state.items():
            self.optimizer.state[self.trainable[name]] = values
        self.scaler.load_state_dict(extra["scaler"])
        if self.around_updates is not None:
            tensors = load_file(folder / _AROUND) if (folder / _AROUND).is_file() else {}
            self.around_updates.load_state(extra["around_updates"], tensors)

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "torch": torch.__version__,
            "world_size": self.ranks.world_size,
            "zero_stage": 0,
            "device": str(self.ranks.device.type),
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def _for_disk(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()
