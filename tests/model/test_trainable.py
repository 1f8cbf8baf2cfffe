"""The trainable-set contract."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mgm_exp.errors import ConfigError, ModelError
from mgm_exp.model import (
    LossModule,
    apply_adapter,
    assert_trainable,
    official_name,
    set_trainable,
)

FULL = {"kind": "full"}


@pytest.fixture(scope="module")
def official(golden: Path) -> dict:
    return json.loads((golden / "trainable_and_lora_names.json").read_text())


def snapshot(model) -> dict[str, torch.Tensor]:
    return {official_name(name): p.detach().clone() for name, p in model.named_parameters()}


def moved_since(before: dict[str, torch.Tensor], model) -> set[str]:
    return {name for name, value in snapshot(model).items() if not torch.equal(value, before[name])}


def step(model, batch, lr: float = 1e-2) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0)
    model.loss(batch).backward()
    optimizer.step()


def test_the_sets_are_the_official_ones(model, lora, official: dict) -> None:
    assert set_trainable(model, "align").names == set(official["trainable_stage1"])
    assert set_trainable(model, "instruct", FULL).names == set(official["trainable_stage2"])
    apply_adapter(model, lora, seed=0)
    trainable = set_trainable(model, "instruct", lora)
    assert trainable.counts()["n_total"] == official["trainable_params"]
    lora_names = {n.removeprefix("base_model.model.").replace(".default.", ".") for n in official["lora_state"]}
    assert trainable.lora == lora_names
    assert trainable.connector == {n.removeprefix("base_model.model.") for n in official["non_lora_trainables"]}
    assert {official_name(n) for n, p in model.named_parameters() if p.requires_grad} == trainable.names


def test_a_frozen_connector_is_not_in_the_set(model, lora) -> None:
    apply_adapter(model, lora, seed=0)
    trainable = set_trainable(model, "instruct", lora, freeze_connector=True)
    assert trainable.connector == frozenset() and trainable.names == trainable.lora
    assert len(trainable.patterns) == 1


def test_align_freezes_the_llm_and_the_towers(model) -> None:
    set_trainable(model, "instruct", FULL)
    trainable = set_trainable(model, "align", FULL)
    assert trainable.llm == trainable.lora == frozenset()
    assert not model.model.layers[0].mlp.up_proj.weight.requires_grad


def test_a_set_that_was_tampered_with_is_noticed(model) -> None:
    trainable = set_trainable(model, "align")
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ModelError, match=r"1 extra \(first \['model.norm.weight'\]\)"):
        assert_trainable(model, trainable)
    model.model.norm.weight.requires_grad_(False)
    model.model.mm_projector[0].weight.requires_grad_(False)
    with pytest.raises(ModelError, match="1 absent"):
        assert_trainable(model, trainable)


def test_an_adapter_that_is_missing_or_undeclared_is_named(model, lora) -> None:
    with pytest.raises(ModelError, match="lacks 28 tensors"):
        set_trainable(model, "instruct", lora)
    with pytest.raises(ConfigError, match="'suffix'"):
        set_trainable(model, "instruct", {"kind": "suffix"})
    with pytest.raises(ConfigError, match="'pretrain'"):
        set_trainable(model, "pretrain", FULL)


@pytest.mark.parametrize("stage", ["align", "lora", "full"])
def test_everything_declared_moves_in_the_first_step_and_nothing_else(model, batch, lora, stage: str) -> None:
    adapter = lora if stage == "lora" else FULL
    if stage == "lora":
        apply_adapter(model, lora, seed=0)
    trainable = set_trainable(model, "align" if stage == "align" else "instruct", adapter)
    before = snapshot(model)
    step(model, batch)
    moved = moved_since(before, model)
    assert moved <= trainable.names
    assert trainable.names - moved <= trainable.zero_gradient_by_construction


def test_lora_a_has_no_gradient_while_b_is_zero_and_then_has_one(model, batch, lora) -> None:
    apply_adapter(model, lora, seed=0)
    trainable = set_trainable(model, "instruct", lora)
    a = {n for n in trainable.lora if ".lora_A." in n}
    assert a < trainable.zero_gradient_by_construction
    before = snapshot(model)
    step(model, batch)
    assert not a & moved_since(before, model)
    middle = snapshot(model)
    step(model, batch)
    assert a <= moved_since(middle, model)


def test_the_two_biases_of_the_keys_have_no_gradient_but_noise(model, batch) -> None:
    trainable = set_trainable(model, "align")
    model.loss(batch).backward()
    gradient = {n: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
    idle = {n for n in trainable.names if gradient[n] < 1e-6}
    assert idle == trainable.zero_gradient_by_construction == {
        "model.vlm_uni_aux_projector.0.bias",
        "model.vlm_uni_aux_projector.1.bias",
    }  # fmt: skip


def test_a_loss_module_has_the_models_names(model) -> None:
    assert set(snapshot(LossModule(model))) == set(snapshot(model))
