"""The LLM's gated MLP, whose gate is GELU by tanh, with the gate as one operation (`train.mlp_kernel=fused`); for CPUs.

    h = gelu(g) * u        gelu(g) = g (1 + tanh z) / 2 = g σ(2z),  z = sqrt(2/π) (g + 0.044715 g³)

(Hendrycks & Gimpel, arXiv 1606.08415.) torch computes the tanh, three times as dear as an exponential on a CPU, in the
forward pass and again in the backward pass. Here σ is computed once and kept in the place of gelu(g), of which the
product's gradient reads nothing but g σ: as many numbers are kept. The same in real arithmetic; the last bits differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mgm_exp.errors import ModelError

# Of 2z = g (_ONE + _CUBE g²)
_ONE = 2 * math.sqrt(2 / math.pi)
_CUBE = 0.044715 * _ONE


def fuse_gates(mlps: Iterable[Any]) -> None:
    """Makes gated MLPs (`gate_proj`, `up_proj`, `down_proj`, `act_fn`) compute so while they train.

    In evaluation they are what they were: a validation point gives the bits of an evaluation.

    Raises:
        ModelError: another activation.
    """
    from transformers.activations import GELUTanh

    for mlp in mlps:
        if not isinstance(mlp.act_fn, GELUTanh):
            raise ModelError(
                f"train.mlp_kernel=fused computes GELU by tanh, and this LLM's MLP has {type(mlp.act_fn).__name__}.",
                advice="Use train.mlp_kernel=torch.",
            )
        mlp.forward = partial(_forward, mlp, mlp.forward)


def _forward(mlp: Any, otherwise: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if not mlp.training:
        return otherwise(x)
    found: Tensor = mlp.down_proj(gated(mlp.gate_proj(x), mlp.up_proj(x)))
    return found


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, both of one shape, dtype (fp32 or fp64) and device."""
    found: Tensor = _Gated.apply(gate, up)
    return found


class _Gated(torch.autograd.Function):
    """See :func:`gated`."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        sigma = torch.mul(gate, gate).mul_(_CUBE).add_(_ONE).mul_(gate).sigmoid_()
        ctx.save_for_backward(gate, up, sigma)
        return torch.mul(gate, sigma).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate, up, sigma = ctx.saved_tensors
        to_up = torch.mul(grad, sigma).mul_(gate)
        # d(g σ)/dg = σ (1 + (1 - σ) g d(2z)/dg)
        slope = torch.mul(gate, gate).mul_(3 * _CUBE).add_(_ONE).mul_(gate)
        to_gate = slope.addcmul_(slope, sigma, value=-1).add_(1).mul_(sigma).mul_(up).mul_(grad)
        return to_gate, to_up
