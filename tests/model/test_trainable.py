"""The trainable-set contract."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mgm_exp.errors import ConfigError, ModelError, TrainingFailed
from mgm_exp.model import (
    LossModule,
    apply_adapter,
    assert_trainable,
    digests,
    moved_names,
    official_name,
    set_trainable,
    verify_moved,
)

FULL = {"kind": "full"}


@pytest.fixture(scope="module")
def official(golden: Path) -> dict:
    return json.loads((golden / "trainable_and_lora_names.json").read_text())


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
    with pytest.raises(ConfigError, match="'prefix'"):
        set_trainable(model, "instruct", {"kind": "prefix"})
    with pytest.raises(ConfigError, match="'pretrain'"):
        set_trainable(model, "pretrain", FULL)


@pytest.mark.parametrize("stage", ["align", "lora", "full"])
def test_everything_declared_moves_in_the_first_step_and_nothing_else(model, batch, lora, stage: str) -> None:
    adapter = lora if stage == "lora" else FULL
    if stage == "lora":
        apply_adapter(model, lora, seed=0)
    trainable = set_trainable(model, "align" if stage == "align" else "instruct", adapter)
    before = digests(model)
    step(model, batch)
    after = digests(model)
    verify_moved(before, after, trainable)
    assert moved_names(before, after) <= trainable.names


def test_lora_a_has_no_gradient_while_b_is_zero_and_then_has_one(model, batch, lora) -> None:
    apply_adapter(model, lora, seed=0)
    trainable = set_trainable(model, "instruct", lora)
    a = {n for n in trainable.lora if ".lora_A." in n}
    assert a < trainable.zero_gradient_by_construction
    before = digests(model)
    step(model, batch)
    middle = digests(model)
    assert not a & moved_names(before, middle)
    step(model, batch)
    assert a <= moved_names(middle, digests(model))


def test_the_two_biases_of_the_keys_have_no_gradient_but_noise(model, batch) -> None:
    trainable = set_trainable(model, "align")
    model.loss(batch).backward()
    gradient = {n: p.grad.norm().item() for n, p in model.named_parameters() if p.grad is not None}
    idle = {n for n in trainable.names if gradient[n] < 1e-6}
    assert idle == trainable.zero_gradient_by_construction == {
        "model.vlm_uni_aux_projector.0.bias",
        "model.vlm_uni_aux_projector.1.bias",
    }  # fmt: skip


def test_a_frozen_tensor_that_moves_and_a_trainable_one_that_does_not_are_named(model, batch) -> None:
    trainable = set_trainable(model, "align")
    before = digests(model)
    with pytest.raises(TrainingFailed, match="did not change"):
        verify_moved(before, digests(model), trainable)
    step(model, batch)
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    with pytest.raises(TrainingFailed, match=r"model\.norm\.weight"):
        verify_moved(before, digests(model), trainable)


def test_what_moved_on_another_process_counts(model) -> None:
    trainable = set_trainable(model, "align")
    before = digests(model)
    verify_moved(before, before, trainable, moved_elsewhere=trainable.names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_digest_sees_one_bit_and_two_swapped_values(dtype: torch.dtype) -> None:
    module = torch.nn.Linear(8, 8, bias=False).to(dtype)
    first = digests(module)
    with torch.no_grad():
        bits = module.weight.view(torch.int16 if dtype == torch.bfloat16 else torch.int32)
        bits[0, 0] ^= 1
    second = digests(module)
    assert moved_names(first, second) == {"weight"}
    with torch.no_grad():
        module.weight[[0, 1]] = module.weight[[1, 0]].clone()
    assert moved_names(second, digests(module)) == {"weight"}


@pytest.mark.parametrize(
    ("wrapped", "official"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight"),
        ("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight", "model.layers.0.mlp.up_proj.weight"),
        ("module.model.model.mm_projector.0.bias", "model.mm_projector.0.bias"),
        ("model.model.layers.3.mlp.up_proj.lora_A.default.weight", "model.layers.3.mlp.up_proj.lora_A.weight"),
        ("model.lm_head.weight", "lm_head.weight"),
        (
            "module.model.base_model.model.model.vision_tower.vision_tower.vision_model.post_layernorm.bias",
            "model.vision_tower.vision_tower.vision_model.post_layernorm.bias",
        ),
    ],
)
def test_official_names_show_through_any_wrapper(wrapped: str, official: str) -> None:
    assert official_name(wrapped) == official


def test_a_loss_module_has_the_models_names(model) -> None:
    assert set(digests(LossModule(model))) == set(digests(model))
