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
from mgm_exp.train.guards import Limits
from mgm_exp.train.job import StageSettings
from mgm_exp.train.optimizer import set_learning_rates, update_at_once
from mgm_exp.train.ranks import Ranks

if TYPE_CHECKING:
    from torch.optim import Optimizer

Batch = Mapping[str, Any]
# Of the name of what an adapter keeps between its updates, among the optimizer's states.
_AROUND = "around"
COMPUTE_DTYPE = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}


@dataclass(frozen=True)
class Update:
    """What became of one optimizer step. Numbers may still lie on the device: reading a property waits for it.

    Args:
        verdict: Whether the weights changed.
        norm: L2 norm of the whole gradient before clipping; not finite where the gradient was not.
        loss_scale: The fp16 loss scale that the gradient was computed with; None in other precisions.
        connector_norm: L2 norm of the gradient of projector and mining; None: not known, or they are not trained.
    """

    verdict: bool | Tensor
    norm: float | Tensor
    loss_scale: float | None = None
    connector_norm: Tensor | None = None

    @property
    def applied(self) -> bool:
        """False where the gradient was not finite, or beyond the limits: nothing was changed."""
        return bool(self.verdict)

    @property
    def grad_norm(self) -> float:
        return float(self.norm)


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


WEIGHTS, STATES = "trainable.safetensors", "optimizer.safetensors"


@dataclass(frozen=True)
class Snapshot:
    """Weights and optimizer state at one step, on the host.

    Args:
        weights: Name -> what is trained, in full precision.
        states: ``exp_avg/NAME``, ``exp_avg_sq/NAME``, ``step/NAME`` -> what AdamW keeps. Both are empty but
            on the first process.
        extra: Plain values: the loss scale.
    """

    weights: dict[str, Tensor]
    states: dict[str, Tensor]
    extra: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Writes both files, on the process that has them."""
        if self.weights:
            from safetensors.torch import save_file

            save_file(self.weights, folder / WEIGHTS)
            save_file(self.states, folder / STATES)


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

    @property
    def reads_late(self) -> bool:
        """Whether it pays to begin the next step before the numbers of this one are read."""
        return False

    @abstractmethod
    def update(self, lr_factor: float, limits: Limits | None = None, loss: Tensor | None = None) -> Update:
        """Clips, applies one AdamW step at ``lr_factor`` of the peak rates, and clears the gradients.

        Nothing is applied when the gradient is not finite on any process.

        Args:
            limits: Nothing is applied beyond them either; None: there are none.
            loss: Of the whole step, over all processes; needed with limits.
        """

    @abstractmethod
    def gradient(self, name: str) -> Tensor | None:
        """The whole gradient of a trainable parameter, between the last backward pass and the update, as the loss
        has it; None where it has none. Called by all processes."""

    def discard(self) -> None:
        """Forgets the gradients of a step that could not be finished."""
        for parameter in self.trainable.values():
            parameter.grad = None

    def not_finite(self) -> list[str]:
        """Which trained weights and optimizer states hold a NaN or infinity, of those that this process keeps."""
        named = [(name, self.resident(parameter)) for name, parameter in self.trainable.items()]
        named = [(name, tensor) for name, tensor in [*named, *self._states()] if tensor.is_floating_point()]
        if not named:
            return []
        # One answer for all tensors: the device is waited for once
        flags = torch.stack([tensor.isfinite().all().to(self.ranks.device) for _, tensor in named]).tolist()
        return [name for (name, _), is_finite in zip(named, flags, strict=True) if not is_finite]

    @abstractmethod
    def _states(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of every optimizer state of this process."""

    def bytes_to_save(self) -> int:
        """Bytes that this process is about to write in :meth:`save`: weights, and what the optimizer keeps of them."""
        sizes = [int(getattr(p, "ds_numel", p.numel())) for p in self.trainable.values()]
        return 3 * 4 * sum(sizes) if self.ranks.is_first else 0

    @abstractmethod
    def snapshot(self) -> Snapshot:
        """A copy of weights and optimizer state that later steps do not change; called by all processes."""

    @abstractmethod
    def restore(self, weights: dict[str, Tensor], states: dict[str, Tensor], extra: dict[str, Any]) -> None:
        """Puts back a :meth:`snapshot`, of this engine or of another one; called by all processes."""

    def save(self, folder: Path) -> dict[str, Any]:
        """Writes a snapshot into ``folder`` (called by all processes); returns plain extra state."""
        snapshot = self.snapshot()
        snapshot.write(folder)
        return snapshot.extra

    def load(self, folder: Path, extra: dict[str, Any]) -> None:
        """Restores what :meth:`save` wrote; the folder has been verified."""
        from safetensors.torch import load_file

        weights = load_file(folder / WEIGHTS, device="cpu")
        unknown = sorted(weights.keys() ^ self.trainable.keys())
        assert not unknown, f"the checkpoint and the stage do not train the same tensors: {unknown[:3]}"
        self.restore(weights, load_file(folder / STATES, device="cpu"), extra)

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


def tensor_norms(tensors: list[Tensor]) -> list[Tensor]:
    """L2 norm of each tensor, on its device, as :func:`torch.nn.utils.get_total_norm` computes them."""
    return list(torch._foreach_norm(tensors)) if tensors else []


def _joined(norms: list[Tensor], device: torch.device) -> Tensor:
    """The L2 norm of all tensors together."""
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), device=device)


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
        on_device: Decide on the device whether a step is applied (by AdamW's fused kernel), so that nobody waits for
            it; None: on a GPU. Never in fp16, whose scaler asks for the answer, or where an adapter does.
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
        on_device: bool | None = None,
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
        self._on_device = ranks.device.type == "cuda" if on_device is None else on_device
        self._on_device &= not self.scaler.is_enabled() and around_updates is None
        for group in self.groups:
            group["fused"] = True if self._on_device else group.get("fused")
        update_at_once(self.groups)
        connector = [p for group in self.groups if group.get("group") == "connector" for p in group["params"]]
        self._connector = {id(parameter) for parameter in connector}

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
            self.to_differentiate(loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach().float()

    def to_differentiate(self, loss: Tensor) -> Tensor:
        """What the backward pass of a micro-batch begins with."""
        # DistributedDataParallel averages over processes, the step's loss is a sum over them
        scaled: Tensor = self.scaler.scale(poisoned_if_not_finite(loss) * self.ranks.world_size)
        return scaled

    def _exchange(self, last: bool) -> AbstractContextManager[Any]:
        if last or self.ranks.world_size == 1:
            return nullcontext()
        assert isinstance(self.module, nn.parallel.DistributedDataParallel)
        return self.module.no_sync()

    @property
    def reads_late(self) -> bool:
        return self._on_device

    def update(self, lr_factor: float, limits: Limits | None = None, loss: Tensor | None = None) -> Update:
        set_learning_rates(self.groups, lr_factor)
        scale = self.scaler.get_scale() if self.scaler.is_enabled() else None
        self.scaler.unscale_(self.optimizer)
        if self.around_updates is not None:
            self.around_updates.before_update()
        parameters = [parameter for parameter in self.trainable.values() if parameter.grad is not None]
        norms = tensor_norms([parameter.grad for parameter in parameters])  # type: ignore[misc]
        norm = _joined(norms, self.ranks.device)
        seen = [size for size, parameter in zip(norms, parameters, strict=True) if id(parameter) in self._connector]
        connector = _joined(seen, self.ranks.device) if self._connector else None
        may_apply = norm.isfinite()
        if limits is not None:
            assert loss is not None
            may_apply &= (norm <= limits.grad_norm) & (loss <= limits.loss)
        if self._on_device:
            self._clip(parameters, norm)
            # torch's own switch for loss scaling: a step with found_inf=1 changes neither weights nor state
            self.optimizer.grad_scale = None  # type: ignore[attr-defined]
            self.optimizer.found_inf = (~may_apply).float()  # type: ignore[attr-defined]
            self.optimizer.step()
            del self.optimizer.grad_scale, self.optimizer.found_inf  # type: ignore[attr-defined]
        elif may_apply:
            self._clip(parameters, norm)
            self.scaler.step(self.optimizer)
        if self.around_updates is not None:
            self.around_updates.after_update(applied=bool(may_apply))
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return Update(may_apply, norm, scale, connector)

    def _clip(self, parameters: list[nn.Parameter], norm: Tensor) -> None:
        if self.max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, norm)

    def gradient(self, name: str) -> Tensor | None:
        gradient = self.trainable[name].grad
        return None if gradient is None else gradient / (self.scaler.get_scale() if self.scaler.is_enabled() else 1.0)

    def _states(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.trainable.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                yield f"{key}/{name}", value

    def snapshot(self) -> Snapshot:
        """On the first process; all hold the same."""
        weights: dict[str, Tensor] = {}
        states: dict[str, Tensor] = {}
        values, tensors = self.around_updates.state() if self.around_updates is not None else ({}, {})
        if self.ranks.is_first:
            weights = {name: _on_host(parameter) for name, parameter in self.trainable.items()}
            states = {name: _on_host(value) for name, value in self._states()}
            states |= {f"{_AROUND}/{name}": _on_host(tensor) for name, tensor in tensors.items()}
        extra = {"scaler": self.scaler.state_dict(), **({"around_updates": values} if values else {})}
        return Snapshot(weights, states, extra)

    def restore(self, weights: dict[str, Tensor], states: dict[str, Tensor], extra: dict[str, Any]) -> None:
        device = self.ranks.device
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(weights[name])
        found: dict[str, dict[str, Tensor]] = {}
        around: dict[str, Tensor] = {}
        for key, value in states.items():
            what, _, name = key.partition("/")
            if what == _AROUND:
                around[name] = value
                continue
            # torch keeps the step counter on the CPU, but for the fused AdamW
            stays = what == "step" and not self._on_device
            found.setdefault(name, {})[what] = value if stays else value.to(device)
        self.optimizer.state.clear()
        for name, values in found.items():
            self.optimizer.state[self.trainable[name]] = values
        if "scaler" in extra:  # else made by DeepSpeed: fp16 finds its scale anew
            self.scaler.load_state_dict(extra["scaler"])
        if self.around_updates is not None:
            self.around_updates.load_state(extra["around_updates"], around)

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "torch": torch.__version__,
            "world_size": self.ranks.world_size,
            "zero_stage": 0,
            "device": str(self.ranks.device.type),
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def _on_host(tensor: Tensor) -> Tensor:
    """A copy: on a CPU, too, where the optimizer would change what is being written."""
    return tensor.detach().to("cpu", copy=True).contiguous()
