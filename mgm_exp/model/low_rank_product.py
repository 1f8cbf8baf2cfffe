"""A frozen linear layer and its LoRA update as one operation (`train.lora_kernel=fused`).

    y = x Wᵀ + b + s · (d(x) Aᵀ) Bᵀ        x (..., inputs) -> y (..., outputs); d: dropout

PEFT's layer makes the update by itself, multiplies it by the scale s and adds it: two passes over all outputs, and in
the backward pass one more over the gradients of the outputs and one over those of the inputs. Here s multiplies the
r columns in the middle, and both sums are taken in the matrix products that make their second part. The same in real
arithmetic; the last bits differ. What is kept for the backward pass is what PEFT's layer keeps: d(x), and r columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mgm_exp.model import dropout_draws


@dataclass
class InputDropout:
    """How LoRA layers drop their inputs; all layers of a model share one.

    Attributes:
        drop: Called with (inputs, rate).
        drop_narrow: The same for the rows that :mod:`mgm_exp.model.last_block` leaves.
        is_narrow: Whether a layer sees those now.
    """

    drop: Callable[[Tensor, float], Tensor] = dropout_draws.dropout
    drop_narrow: Callable[[Tensor, float], Tensor] = dropout_draws.dropout
    is_narrow: bool = False

    def __call__(self, x: Tensor, rate: float) -> Tensor:
        return (self.drop_narrow if self.is_narrow else self.drop)(x, rate)


def fuse(model: nn.Module, dropout: InputDropout | None = None) -> int:
    """Makes the model's plain LoRA layers compute so while they train; how many it changed.

    Plain is what PEFT puts onto a frozen ``nn.Linear`` without a variant (DoRA): other layers stay as they are.
    In evaluation PEFT's own forward runs: a validation point gives the bits of an evaluation.

    Args:
        dropout: May be changed between passes; None: torch's own.
    """
    from peft.tuners.lora.layer import Linear

    found = [layer for layer in model.modules() if type(layer) is Linear and _is_plain(layer)]
    dropout = dropout or InputDropout()
    for layer in found:
        layer.forward = partial(_forward, layer, dropout, layer.forward)
    return len(found)


def _is_plain(layer: Any) -> bool:
    is_one = len(layer.active_adapters) == 1 and "forward" not in vars(layer)
    is_usual = type(layer.base_layer) is nn.Linear and not layer.lora_variant and not layer.fan_in_fan_out
    return is_one and is_usual and not any(own.requires_grad for own in layer.base_layer.parameters())


def _forward(layer: Any, dropout: InputDropout, otherwise: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """In place of PEFT's ``Linear.forward`` (``otherwise``)."""
    if not layer.training or layer.disable_adapters or layer.merged or args or kwargs:
        return otherwise(x, *args, **kwargs)
    (name,) = layer.active_adapters
    base, down, up = layer.base_layer, layer.lora_A[name].weight, layer.lora_B[name].weight
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else base.weight.dtype
    x = x.to(dtype)
    own = layer.lora_dropout[name]  # nn.Identity where there is none
    dropped = dropout(x, own.p) if isinstance(own, nn.Dropout) and own.p > 0 else None
    bias = None if base.bias is None else base.bias.to(dtype)
    with torch.autocast(device, enabled=False):
        return product(
            x, dropped, base.weight.to(dtype), bias, down.to(dtype), up.to(dtype), float(layer.scaling[name])
        )


def product(
    x: Tensor, dropped: Tensor | None, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
) -> Tensor:
    """The operation itself; all tensors of one dtype.

    Args:
        x: (..., inputs).
        dropped: x after dropout; None: there is none.
        weight, bias: (outputs, inputs) and (outputs,); frozen: they are given no gradient.
        down, up: A (r, inputs) and B (outputs, r).

    Returns:
        (..., outputs).
    """
    return _Product.apply(x, dropped, weight, bias, down, up, scale)


# Columns from which on MKL without AVX-512 computes them well in any layout.
_MANY_COLUMNS = 16


def to_columns(grad: Tensor, up: Tensor) -> Tensor:
    """Gradients of the r columns: (..., n, outputs) and B (..., outputs, r) -> (..., n, r)."""
    if up.shape[-1] < _MANY_COLUMNS:
        up = up.mT.contiguous().mT
    return torch.matmul(grad, up)


def gradient_of_up(grad: Tensor, low: Tensor) -> Tensor:
    """That of B: (..., n, outputs) and the columns (..., n, r) -> (..., outputs, r).

    By its transpose: few rows are computed up to seven times faster than few columns, by MKL without AVX-512.
    """
    return torch.matmul(low.mT, grad).mT.contiguous()


class _Product(torch.autograd.Function):
    """See :func:`product`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        given = rows if dropped is None else dropped.reshape(rows.shape)
        low = torch.mm(given, down.t()).mul_(scale)
        out = torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
        ctx.save_for_backward(given, low, weight, down, up)
        ctx.scale, ctx.is_dropped = scale, dropped is not None
        return out.addmm_(low, up.t()).view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        given, low, weight, down, up = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        to_low = to_columns(rows, up).mul_(ctx.scale)
        to_x = to_dropped = None
        if ctx.needs_input_grad[0]:
            to_x = torch.mm(rows, weight)
        if ctx.is_dropped:
            if ctx.needs_input_grad[1]:
                to_dropped = torch.mm(to_low, down).view(*grad.shape[:-1], down.shape[1])
        elif to_x is not None:
            to_x.addmm_(to_low, down)
        return (
            None if to_x is None else to_x.view(*grad.shape[:-1], weight.shape[1]),
            to_dropped,
            None,
            None,
            torch.mm(to_low.t(), given),
            gradient_of_up(rows, low),
            None,
        )
