"""A gate of GELU by tanh as one operation: torch's values and gradients, no more memory, and only while it trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.activations import ACT2FN

from mgm_exp.errors import ModelError
from mgm_exp.model.gated_gelu import fuse_gates, gated

TANH = "gelu_pytorch_tanh"


def by_torch(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def drawn(seed: int, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Gate, up and the gradient of their product."""
    generator = torch.Generator().manual_seed(seed)
    gate, up, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return [(gate * scale).to(dtype), up.to(dtype), grad.to(dtype)]


def found(way: Callable[[Tensor, Tensor], Tensor], gate: Tensor, up: Tensor, grad: Tensor) -> list[Tensor]:
    """The product and both gradients."""
    gate, up = gate.clone().requires_grad_(), up.clone().requires_grad_()
    out = way(gate, up)
    return [out.detach(), *torch.autograd.grad(out, (gate, up), grad)]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(0, 9), width=st.integers(1, 70), scale=st.floats(1e-6, 60))
def test_it_is_torchs_in_float64(seed: int, rows: int, width: int, scale: float) -> None:
    given_ = drawn(seed, 2, rows, width, scale=scale)
    for ours, torchs in zip(found(gated, *given_), found(by_torch, *given_), strict=True):
        assert ours.shape == torchs.shape
        assert torch.allclose(ours, torchs, rtol=1e-12, atol=1e-12 * (1 + scale))


def test_in_float32_it_is_as_near_to_the_truth_as_torch_is() -> None:
    for scale in (0.01, 1.0, 4.0, 30.0):
        exact = found(by_torch, *drawn(3, 400, 64, scale=scale))
        given_ = drawn(3, 400, 64, scale=scale, dtype=torch.float32)
        for true, ours, torchs in zip(exact, found(gated, *given_), found(by_torch, *given_), strict=True):
            far = [float((one.double() - true).abs().max()) for one in (ours, torchs)]
            assert far[0] <= 3 * far[1] + 1e-7, scale


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-30, 9.0, -9.0, 1e4, -1e4])
def test_large_and_small_values_stay_finite(value: float) -> None:
    given_ = [torch.full((4,), value), torch.ones(4), torch.ones(4)]
    for ours, torchs in zip(found(gated, *given_), found(by_torch, *given_), strict=True):
        assert torch.allclose(ours, torchs, rtol=1e-6, atol=1e-5 * max(1.0, abs(value)) if abs(value) < 1e3 else 1.0)
        assert bool(ours.isfinite().all())


def test_what_is_not_finite_is_seen() -> None:
    given_ = [torch.tensor([1.0, float("nan")]), torch.ones(2), torch.ones(2)]
    assert all(not bool(ours.isfinite().all()) for ours in found(gated, *given_))


def kept(way: Callable[[Tensor, Tensor], Tensor]) -> int:
    """Numbers that are kept for the backward pass."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.data_ptr()] = tensor.numel()
        return tensor

    gate, up = (tensor.requires_grad_() for tensor in drawn(0, 8, 16)[:2])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = way(gate, up)
    out.sum().backward()
    return sum(sizes.values())


def test_no_more_is_kept_than_torch_keeps() -> None:
    assert kept(gated) == kept(by_torch) == 3 * 8 * 16


class Mlp(nn.Module):
    """As those of Gemma and Llama are."""

    def __init__(self, activation: str = TANH) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(6, 10, bias=False), nn.Linear(6, 10, bias=False)
        self.down_proj, self.act_fn = nn.Linear(10, 6, bias=False), ACT2FN[activation]

    def forward(self, x: Tensor) -> Any:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def test_an_mlp_has_the_same_bits_in_evaluation_and_others_while_it_trains() -> None:
    torch.manual_seed(0)
    mlp, x = Mlp(), torch.randn(50, 6)
    before = mlp(x)
    fuse_gates([mlp])
    assert "_Gated" in str(mlp(x).grad_fn.next_functions)
    assert torch.allclose(mlp(x), before, atol=1e-6)
    mlp.eval()
    assert torch.equal(mlp(x), before)
    mlp.train()
    wide = mlp.double()
    assert torch.allclose(wide(x.double()), Mlp.forward(wide, x.double()), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
def test_another_activation_is_refused_by_name(activation: str) -> None:
    with pytest.raises(ModelError, match=f"GELU by tanh, and this LLM's MLP has {type(ACT2FN[activation]).__name__}"):
        fuse_gates([Mlp(activation)])
