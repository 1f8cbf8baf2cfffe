"""A linear layer and its LoRA update as one operation: against PEFT's own layer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from mgm_exp.model.low_rank_product import fuse

INPUTS, HIDDEN, RANK = 12, 20, 3
Make = Callable[..., nn.Module]


class Two(nn.Module):
    """Two layers, of which the second one's inputs need gradients."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(INPUTS, HIDDEN, bias=bias), nn.Linear(HIDDEN, INPUTS, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.fixture
def make() -> Make:
    """A model with LoRA that has learnt something."""

    def made(
        *, bias: bool = False, dropout: float = 0.0, dtype: torch.dtype = torch.float64, **more: bool
    ) -> nn.Module:
        torch.manual_seed(0)
        config = LoraConfig(r=RANK, lora_alpha=5, lora_dropout=dropout, target_modules=["first", "second"], **more)
        model = get_peft_model(Two(bias), config)  # type: ignore[arg-type]
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        return model.to(dtype).train()

    return made


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, and gradients of inputs and weights."""
    x = x.clone().requires_grad_()
    torch.manual_seed(7)  # of dropout
    y = model(x)
    (y.float() ** 2).sum().backward() if y.dtype is not torch.float64 else (y**2).sum().backward()
    assert x.grad is not None
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **grads}


def rows(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 5, INPUTS, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def furthest(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference, by the largest element of its tensor."""
    assert found.keys() == wanted.keys()
    return max(float((found[n].double() - t.double()).abs().max() / t.double().abs().max()) for n, t in wanted.items())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_outputs_and_all_gradients_are_pefts(make: Make, bias: bool, dropout: float, use_rslora: bool) -> None:
    plain = make(bias=bias, dropout=dropout, use_rslora=use_rslora)
    fused = copy.deepcopy(plain)
    assert (fuse(fused), fuse(fused)) == (2, 0)
    found = step(fused, rows())
    assert len(found) == 6  # output, inputs, two factors of two layers; nothing for the frozen base
    assert furthest(found, step(plain, rows())) < 1e-12


def test_a_layer_whose_inputs_need_no_gradient_trains_its_factors(make: Make) -> None:
    plain = make(dropout=0.2)
    fused = copy.deepcopy(plain)
    fuse(fused)
    found = []
    for model in (plain, fused):
        torch.manual_seed(7)
        (model(rows()) ** 2).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(found[0]) == 4
    assert furthest(found[1], found[0]) < 1e-12


def test_under_autocast_it_is_no_further_from_the_truth_than_pefts_layer(make: Make) -> None:
    truth = step(make(), rows())
    far = []
    for is_fused in (False, True):
        model = make(dtype=torch.float32)
        if is_fused:
            fuse(model)
        with torch.autocast("cpu", torch.bfloat16):
            found = step(model, rows(torch.float32))
        assert found["y"].dtype is torch.bfloat16
        assert all(t.dtype is torch.float32 for name, t in found.items() if name != "y")
        far.append(furthest(found, truth))
    assert 0 < far[1] < 1.5 * far[0]


def test_in_evaluation_and_without_its_adapter_a_layer_is_pefts_to_the_bit(make: Make) -> None:
    plain = make(dtype=torch.float32, dropout=0.5)
    fused = copy.deepcopy(plain)
    fuse(fused)
    x = rows(torch.float32)
    assert not torch.equal(plain(x), fused(x))  # training, with other masks: so what follows is not always so
    plain.eval(), fused.eval()
    assert torch.equal(plain(x), fused(x))
    plain.train(), fused.train()
    with plain.disable_adapter(), fused.disable_adapter():  # type: ignore[operator]
        assert torch.equal(plain(x), fused(x))
    for model in (plain, fused):
        model.merge_adapter()  # type: ignore[operator]
    assert torch.equal(plain(x), fused(x))


def test_recomputed_activations_give_the_same_bits(make: Make) -> None:
    from torch.utils.checkpoint import checkpoint

    model = make(dtype=torch.float32, dropout=0.3)
    fuse(model)
    kept = step(model, rows(torch.float32))
    kept = {name: tensor.clone() for name, tensor in kept.items()}
    model.zero_grad()
    again = step(_Recomputed(model, checkpoint), rows(torch.float32))
    assert all(
        torch.equal(again[name.replace("base_model", "model.base_model")] if name not in "xy" else again[name], t)
        for name, t in kept.items()
    )


class _Recomputed(nn.Module):
    def __init__(self, model: nn.Module, checkpoint: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self._checkpoint = model, checkpoint

    def forward(self, x: Tensor) -> Tensor:
        return self._checkpoint(self.model, x, use_reentrant=False)


def test_layers_that_compute_more_are_left_alone(make: Make) -> None:
    assert fuse(make(use_dora=True)) == 0
    assert fuse(Two(bias=True)) == 0
    model = make()
    model.get_submodule("base_model.model.first.base_layer").requires_grad_(True)
    assert fuse(model) == 1
