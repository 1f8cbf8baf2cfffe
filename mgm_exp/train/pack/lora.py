"""Low-rank updates of several trials at once: one pair of batched products for each layer.

Trial k has factors A_k (r_k, inputs) and B_k (outputs, r_k), a scale s_k and a dropout rate of its own. They are
stacked into A (K, R, inputs) and B (K, outputs, R), R the largest rank; rows and columns beyond a trial's rank are
zero, add nothing, and are given no gradient. With x (K, n, inputs), n the rows of one trial:

    y = x W^T + (dropout_k(x_k) A_k^T) (s_k B_k)^T

The factors themselves stay each trial's own parameters: the gradient of a stack is handed back to them in parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mgm_exp.model import dropout_draws
from mgm_exp.model.low_rank_product import gradient_of_up, to_columns
from mgm_exp.model.padding_free import Padding


@dataclass(frozen=True)
class LowRank:
    """One trial's update of one layer.

    Args:
        down, up: A (r, inputs) and B (outputs, r).
        scale: alpha / r, or alpha / sqrt(r).
        dropout: Rate on the layer's input.
    """

    down: Tensor
    up: Tensor
    scale: float
    dropout: float

    @classmethod
    def of(cls, layer: Any) -> LowRank:
        """What PEFT's layer holds."""
        (name,) = layer.active_adapters
        rate = float(getattr(layer.lora_dropout[name], "p", 0.0))
        return cls(layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name]), rate)


class Draws:
    """The random numbers of one trial in one pass: what it would draw alone, whoever computes beside it.

    A layer that is computed again in the backward pass (gradient checkpointing) draws what it drew before.

    Args:
        state: Of torch's generator on the device that computes, when the pass begins.
    """

    def __init__(self, state: Tensor, device: torch.device) -> None:
        self.state, self._device = state, device
        self._before: dict[str, Tensor] = {}

    def dropout(self, x: Tensor, rate: float, place: str, padding: Padding | None = None) -> Tensor:
        """torch's own dropout, on the trial's own rows.

        Args:
            x: (B, T, inputs), without what others made it longer by.
            place: Name of the layer.
            padding: Where rows that do not stand as in the batch, (1, n, inputs), stood.
        """
        is_again = place in self._before
        start = self._before.setdefault(place, self.state)
        _set_state(start, self._device)
        # Kernels may draw in the order of memory
        dropped = dropout_draws.dropout(x.contiguous(), rate) if padding is None else padding.dropout(x, rate)
        if not is_again:
            self.state = _state(self._device)
        return dropped


def _state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


@dataclass
class Rows:
    """Whose the rows of a pass are; all layers of the body read it.

    Args:
        lengths: Of each trial's own longest row.
        at_end: Whether shorter rows stand at the end (padding on the left).
        samples: Of each trial.
        learnt: Each trial's positions that the loss reads, in its own batch.
        is_narrow: Whether a layer sees those alone (:mod:`mgm_exp.model.last_block`), of every trial as many as the
            longest list has.
        stand_ins: What layers read in place of a trial's factor, by the factor's id.
    """

    trials: Sequence[int] = ()
    lengths: Sequence[int] = ()
    samples: int = 0
    at_end: bool = False
    draws: Sequence[Draws] = ()
    learnt: Sequence[Padding] = ()
    is_narrow: bool = False
    stand_ins: Mapping[int, Tensor] = field(default_factory=dict)

    @contextmanager
    def replaced(self, stand_ins: Mapping[int, Tensor]) -> Iterator[None]:
        """Layers read these while it is open."""
        before, self.stand_ins = self.stand_ins, stand_ins
        try:
            yield
        finally:
            self.stand_ins = before

    def factor(self, factor: Tensor) -> Tensor:
        """It, or what stands in for it."""
        return self.stand_ins.get(id(factor), factor)

    def positions(self, length: int, device: torch.device) -> Tensor:
        """(K * B, length): of each token of a pass in the rows of its own trial, as alone."""
        counted = torch.arange(length, device=device)
        if not self.at_end:
            return counted.expand(len(self.trials) * self.samples, length)
        own = [(counted - (length - longest)).clamp(min=0) for longest in self.lengths]
        return torch.stack(own).repeat_interleave(self.samples, dim=0)

    def own(self, x: Tensor, place: int) -> Tensor:
        """(B, T, ...) of one trial -> without the positions that only others have."""
        length = self.lengths[place]
        return x[:, x.shape[1] - length :] if self.at_end else x[:, :length]

    def read(self, length: int, multiple: int = 1) -> Tensor:
        """Positions that the loss reads, (K, n) in the flattened pass of rows that are so long; shorter lists end in
        the trial's first position, whose values nobody takes.

        Args:
            multiple: Of this is n, and where it is not 1, n is not 0.
        """
        longest = max(len(own.places) for own in self.learnt)
        if multiple > 1:
            longest = -(-max(longest, 1) // multiple) * multiple
        found = []
        for place, own in enumerate(self.learnt):
            samples, mine = own.shape
            first = place * samples * length + (length - mine if self.at_end else 0)
            places = own.places + own.places.div(mine, rounding_mode="floor") * (length - mine) + first
            found.append(F.pad(places, (0, longest - len(places)), value=first))
        return torch.stack(found)

    def widened(self, x: Tensor, length: int) -> Tensor:
        """The reverse, filled with zeros."""
        more = length - x.shape[1]
        if not more:
            return x
        return F.pad(x, (0, 0, more, 0) if self.at_end else (0, 0, 0, more))


class PackedLinear(nn.Module):
    """A frozen linear layer with the updates of several trials.

    Args:
        base: The layer.
        name: Of the layer.
        updates: Of all trials that may take part.
        rows: Whose rows the next pass has; shared by all layers.
    """

    def __init__(self, base: nn.Module, name: str, updates: Sequence[LowRank], rows: Rows) -> None:
        super().__init__()
        self.base, self.name, self._rows = base, name, rows
        self._updates = list(updates)  # not registered: they are the trials' own

    def forward(self, x: Tensor) -> Tensor:
        """(K * B, T, inputs) -> (K * B, T, outputs); of narrow rows (K, n, inputs) -> (K, n, outputs)."""
        rows, updates = self._rows, [self._updates[trial] for trial in self._rows.trials]
        count = len(updates)
        assert len(x) == count * (1 if rows.is_narrow else rows.samples)
        base: Any = self.base
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else base.weight.dtype
        x = x.to(dtype)
        dropped = self._dropped(x, updates)
        down = _Stacked.apply(0, [1.0] * count, *(rows.factor(update.down) for update in updates))
        up = _Stacked.apply(1, [update.scale for update in updates], *(rows.factor(update.up) for update in updates))
        bias = None if base.bias is None else base.bias.to(dtype)
        with torch.autocast(device, enabled=False):
            return _Products.apply(x, dropped, base.weight.to(dtype), bias, down.to(dtype), up.to(dtype))

    def _dropped(self, x: Tensor, updates: Sequence[LowRank]) -> Tensor | None:
        """The rows with each trial's dropout; None where no trial has any."""
        if not self.training or not any(update.dropout for update in updates):
            return None
        rows, parts = self._rows, list(x.split(1 if self._rows.is_narrow else self._rows.samples))
        for place, (update, draws) in enumerate(zip(updates, rows.draws, strict=True)):
            if not update.dropout:
                continue
            if rows.is_narrow:
                own = rows.learnt[place]
                mine = parts[place][:, : len(own.places)]
                dropped = draws.dropout(mine, update.dropout, self.name, own)
                parts[place] = F.pad(dropped, (0, 0, 0, x.shape[1] - mine.shape[1]))
            else:
                dropped = draws.dropout(rows.own(parts[place], place), update.dropout, self.name)
                parts[place] = rows.widened(dropped, x.shape[1])
        return torch.cat(parts)


class _Products(torch.autograd.Function):
    """The layer and its updates as one operation: sums are taken in the products that make their second part, as
    :mod:`mgm_exp.model.low_rank_product` does for one trial. The base is frozen: it is given no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor
    ) -> Tensor:
        count, inputs = len(down), x.shape[-1]
        given = (x if dropped is None else dropped).reshape(count, x.shape[0] * x.shape[1] // count, inputs)
        low = torch.bmm(given, down.transpose(1, 2))  # (K, n, R)
        rows = x.reshape(-1, inputs)
        out = torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
        out.view(count, len(rows) // count, out.shape[-1]).baddbmm_(low, up.transpose(1, 2))
        ctx.save_for_backward(given, low, weight, down, up)
        ctx.is_dropped = dropped is not None
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        given, low, weight, down, up = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        own = rows.view(len(down), len(rows) // len(down), rows.shape[-1])
        to_low = to_columns(own, up)
        to_x = to_dropped = None
        if ctx.needs_input_grad[0]:
            to_x = torch.mm(rows, weight)
        if ctx.is_dropped:
            if ctx.needs_input_grad[1]:
                to_dropped = torch.bmm(to_low, down).view(*grad.shape[:-1], down.shape[2])
        elif to_x is not None:
            to_x.view_as(given).baddbmm_(to_low, down)
        return (
            None if to_x is None else to_x.view(*grad.shape[:-1], weight.shape[1]),
            to_dropped,
            None,
            None,
            torch.bmm(to_low.transpose(1, 2), given),
            gradient_of_up(own, low),
        )


class _Stacked(torch.autograd.Function):
    """Factors of several ranks, each times its scale, as one tensor; the gradient of zeros is dropped."""

    @staticmethod
    def forward(ctx: Any, dim: int, scales: Sequence[float], *factors: Tensor) -> Tensor:
        ctx.dim, ctx.scales, ctx.ranks = dim, scales, [factor.shape[dim] for factor in factors]
        shape = list(factors[0].shape)
        shape[dim] = max(ctx.ranks)
        stacked = factors[0].new_zeros(len(factors), *shape)
        for part, factor, scale in zip(stacked, factors, scales, strict=True):
            own = part.narrow(dim, 0, factor.shape[dim])
            torch.mul(factor, scale, out=own) if scale != 1.0 else own.copy_(factor)
        return stacked

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        parts = [part.narrow(ctx.dim, 0, rank) for part, rank in zip(grad, ctx.ranks, strict=True)]
        return None, None, *(p if s == 1.0 else p * s for p, s in zip(parts, ctx.scales, strict=True))
