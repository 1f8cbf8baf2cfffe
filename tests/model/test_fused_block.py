"""Norms and gates as one operation each: torch's values and gradients, no more memory, and only while they train."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GemmaConfig, GemmaModel
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mgm_exp.errors import ModelError
from mgm_exp.model.configuration import MGMGemmaConfig, MGMLlamaConfig
from mgm_exp.model.fused_block import check_fusable, fuse_blocks, gated, rms_norm
from mgm_exp.model.last_block import is_plain_in_evaluation

TANH, EPS = "gelu_pytorch_tanh", 1e-6


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


def kept(way: Callable[[Tensor, Tensor], Tensor], width: int | None = None) -> int:
    """Numbers that are kept for the backward pass."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.data_ptr()] = tensor.numel()
        return tensor

    gate, up = (tensor.requires_grad_() for tensor in drawn(0, 8, 16)[:2])
    up = up if width is None else torch.ones(width, dtype=gate.dtype)  # a frozen scale
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = way(gate, up)
    out.sum().backward()
    return sum(sizes.values())


def test_no_more_is_kept_than_torch_keeps() -> None:
    assert kept(gated) == kept(by_torch) == 3 * 8 * 16


# -- norms ---------------------------------------------------------------------------------------------------------


def normed_by_torch(x: Tensor, scale: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * scale


def normed(x: Tensor, scale: Tensor) -> Tensor:
    return rms_norm(x, scale, EPS)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    width=st.integers(1, 70),
    scale=st.floats(1e-6, 1e4),
)
def test_a_norm_is_the_formulas_in_float64(seed: int, shape: list[int], width: int, scale: float) -> None:
    x, _, grad = drawn(seed, *shape, width, scale=scale)
    given_ = x, torch.randn(width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), grad
    for ours, torchs in zip(found(normed, *given_), found(normed_by_torch, *given_), strict=True):
        assert ours.shape == torchs.shape
        assert torch.allclose(ours, torchs, rtol=1e-12, atol=1e-12 * max(1.0, 1 / scale))


def test_a_norm_in_float32_is_as_near_to_the_truth_as_gemmas_is() -> None:
    gemmas = GemmaRMSNorm(64, eps=EPS)
    for scale in (1e-3, 1.0, 1e3):
        exact = found(normed_by_torch, *with_scale(scale, torch.float64))
        given_ = with_scale(scale, torch.float32)
        gemmas.weight = nn.Parameter(given_[1] - 1)
        theirs = found(lambda x, weight: gemmas._norm(x) * weight, *given_)
        for true, ours, other in zip(exact, found(normed, *given_), theirs, strict=True):
            far = [float((one.double() - true).abs().max()) for one in (ours, other)]
            assert far[0] <= 3 * far[1] + 1e-7 * float(true.abs().max()), scale


def with_scale(scale: float, dtype: torch.dtype) -> list[Tensor]:
    x, weight, grad = drawn(5, 300, 64, scale=scale, dtype=dtype)
    return [x, weight[0], grad]


def test_a_norm_of_zeros_is_zero_and_of_nan_is_seen() -> None:
    weight, grad = torch.ones(4), torch.ones(2, 4)
    assert not any(bool(tensor.isnan().any()) for tensor in found(normed, torch.zeros(2, 4), weight, grad))
    bad = found(normed, torch.tensor([[1.0, float("nan"), 0, 0], [1, 1, 1, 1]]), weight, grad)
    assert bool(bad[0][0].isnan().all()) and bool(bad[0][1].isfinite().all()) and bool(bad[1][0].isnan().all())


def test_frozen_norms_are_given_no_gradient() -> None:
    x, weight = torch.ones(3, 4, requires_grad=True), torch.ones(4)
    rms_norm(x, weight, EPS).sum().backward()
    assert x.grad is not None and weight.grad is None
    weight.requires_grad_()
    rms_norm(x.detach(), weight, EPS).sum().backward()
    assert weight.grad is not None


# -- blocks --------------------------------------------------------------------------------------------------------


def blocks(count: int = 2) -> tuple[list[nn.Module], GemmaRMSNorm]:
    """Decoder layers of a small Gemma, and the norm behind them."""
    config = GemmaConfig(
        vocab_size=9, hidden_size=8, intermediate_size=12, num_hidden_layers=count, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, hidden_act=TANH,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GemmaModel(config)
    return list(model.layers), model.norm


def test_they_have_the_same_bits_in_evaluation_and_others_while_they_train() -> None:
    layers, norm = blocks()
    mlp, x = layers[0].mlp, torch.randn(50, 8)
    before, normed_before = mlp(x), norm(x)
    fuse_blocks(layers, norm)
    assert "_Gated" in str(mlp(x).grad_fn.next_functions) and "_RmsNorm" in str(norm(x).grad_fn)
    assert torch.allclose(mlp(x), before, atol=1e-6) and torch.allclose(norm(x), normed_before, atol=1e-5)
    for module, expected in ((mlp, before), (norm, normed_before)):
        module.eval()
        assert torch.equal(module(x), expected)
        assert is_plain_in_evaluation(module)
        module.train()


def test_a_copy_of_them_has_weights_of_its_own() -> None:
    layers, norm = blocks()
    fuse_blocks(layers, norm)
    x, twin = torch.randn(5, 8), copy.deepcopy(norm)
    twin.weight.data.add_(1)
    assert torch.allclose(twin(x), 2 * norm(x), atol=1e-6)


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
def test_another_activation_is_refused_by_name(activation: str) -> None:
    layers, norm = blocks()
    layers[1].mlp.act_fn = ACT2FN[activation]
    with pytest.raises(ModelError, match=f"GELU by tanh, and this LLM has {type(ACT2FN[activation]).__name__}"):
        fuse_blocks(layers, norm)
    assert not any("forward" in vars(module) for layer in layers for module in layer.modules())


def test_models_are_known_by_their_configuration() -> None:
    check_fusable(MGMGemmaConfig(hidden_activation=TANH))
    with pytest.raises(ModelError, match="this LLM has blocks that are not Gemma's"):
        check_fusable(MGMLlamaConfig())


def test_a_norm_keeps_no_more_than_torch_keeps() -> None:
    assert kept(normed, 16) <= kept(lambda x, scale: GemmaRMSNorm(16, EPS)._norm(x) * scale, 16)


def test_another_norm_is_refused_by_name() -> None:
    layers, _ = blocks()
    with pytest.raises(ModelError, match="this LLM has LlamaRMSNorm"):
        fuse_blocks(layers, LlamaRMSNorm(8))
