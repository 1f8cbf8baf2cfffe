"""Norms and gated MLPs of a Gemma's blocks, each as one operation (`train.block_kernel=fused`); for CPUs.

    n(x) = x / sqrt(mean(x²) + ε) * (1 + w)
    h = gelu(g) * u,  gelu(g) = g (1 + tanh z) / 2 = g σ(2z),  z = sqrt(2/π) (g + 0.044715 g³)

(RMSNorm: Zhang & Sennrich, arXiv 1910.07467, as Gemma has it; GELU by tanh: Hendrycks & Gimpel, arXiv 1606.08415.)
transformers' norm is eight operations of torch, and its gradient twice as many. A tanh costs a CPU three exponentials,
and torch computes it in the forward pass and again in the backward pass: here σ is computed once, and kept in the place
of gelu(g), which is g σ. No more is kept than before. The same in real arithmetic; the last bits differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import GemmaConfig

from mgm_exp.errors import ModelError
from mgm_exp.model.configuration import MGMConfig
from mgm_exp.model.while_training import WhileTraining

# Of 2z = g (_ONE + _CUBE g²)
_ONE = 2 * math.sqrt(2 / math.pi)
_CUBE = 0.044715 * _ONE


def fuse_blocks(blocks: list[nn.Module], last_norm: nn.Module) -> None:
    """Makes a Gemma's blocks, and the norm behind them, compute so while they train.

    In evaluation they are what they were: a validation point gives the bits of an evaluation.

    Raises:
        ModelError: norms or an activation that are not Gemma's.
    """
    from transformers.activations import GELUTanh
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    norms: list[Any] = [last_norm]
    mlps: list[Any] = []
    for block in blocks:
        norms += [block.input_layernorm, block.post_attention_layernorm]
        mlps += [block.mlp]
    other = [norm for norm in norms if type(norm) is not GemmaRMSNorm]
    other += [mlp.act_fn for mlp in mlps if type(mlp.act_fn) is not GELUTanh]
    if other:
        raise _not_fusable(type(other[0]).__name__)
    ways: list[tuple[Any, Callable[[Any, Tensor], Tensor]]] = [(norm, _normed) for norm in norms]
    for module, way in ways + [(mlp, _through) for mlp in mlps]:
        module.forward = WhileTraining(module, partial(way, module))


def check_fusable(config: MGMConfig) -> None:
    """Raises ModelError where a model that is described so has other norms, or another activation."""
    if not isinstance(config, GemmaConfig):
        raise _not_fusable("blocks that are not Gemma's")
    if config.activation != "gelu_pytorch_tanh":
        raise _not_fusable(f"hidden_activation={config.activation}")


def _not_fusable(has: str) -> ModelError:
    return ModelError(
        f"train.block_kernel=fused computes Gemma's norms and GELU by tanh, and this LLM has {has}.",
        advice="Use train.block_kernel=torch.",
    )


def _normed(norm: Any, x: Tensor) -> Tensor:
    return rms_norm(x, 1.0 + norm.weight, norm.eps)


def _through(mlp: Any, x: Tensor) -> Tensor:
    found: Tensor = mlp.down_proj(gated(mlp.gate_proj(x), mlp.up_proj(x)))
    return found


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x over its root mean square, times the scale: (..., D) and (D,), of one dtype (fp32 or fp64)."""
    found: Tensor = _RmsNorm.apply(x, scale, eps)
    return found


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, both of one shape and dtype (fp32 or fp64)."""
    found: Tensor = _Gated.apply(gate, up)
    return found


class _RmsNorm(torch.autograd.Function):
    """See :func:`rms_norm`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        root = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = root.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = x * inverse
        ctx.save_for_backward(normed, inverse, scale)
        return normed * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        normed, inverse, scale = ctx.saved_tensors
        to_scale = (grad * normed).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, to_scale, None
        scaled = grad * scale
        along = (scaled * normed).mean(-1, keepdim=True)
        return scaled.addcmul_(normed, along, value=-1).mul_(inverse), to_scale, None


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
