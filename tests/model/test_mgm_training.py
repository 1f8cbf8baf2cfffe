"""What training asks of the model: its loss, recomputation, frozen towers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mgm_exp.model import LossModule, apply_adapter, load_model, set_trainable


def gradients(model, batch) -> dict[str, Tensor]:
    model.zero_grad()
    model.loss(batch).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["basic", "row_without_image"])
def test_loss_equals_that_of_forward(still_model, case, name: str) -> None:
    t = case(name)
    keys = ("input_ids", "attention_mask", "labels", "images", "images_aux")
    with torch.no_grad():
        full = still_model(**{k: t[k] for k in keys}).loss
        torch.testing.assert_close(still_model.loss(t), full, rtol=1e-6, atol=0)


def test_normalizer_divides_the_sum_over_supervised_tokens(still_model, batch) -> None:
    with torch.no_grad():
        _, _, labels = still_model.merge(**batch)
        n = int((labels[:, 1:] != -100).sum())
        torch.testing.assert_close(still_model.loss(batch, normalizer=5.0) * 5.0, still_model.loss(batch) * n)


def test_micro_batches_over_one_normalizer_add_up_to_the_whole_batch(still_model, batch) -> None:
    with torch.no_grad():
        _, _, labels = still_model.merge(**batch)
        n = float((labels[:, 1:] != -100).sum())
        parts = [still_model.loss({k: v[i : i + 1] for k, v in batch.items()}, normalizer=n) for i in range(2)]
        torch.testing.assert_close(sum(parts), still_model.loss(batch), rtol=1e-6, atol=0)


def test_a_batch_with_nothing_to_learn_has_loss_zero_and_zero_gradients(model, batch) -> None:
    silent = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    loss = model.loss(silent)
    loss.backward()
    assert loss.item() == 0.0
    assert model(**silent).loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


def test_a_text_only_batch_keeps_the_connector_in_the_graph(model, batch) -> None:
    text = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["input_ids"] == -200, 7)}
    found = gradients(model, text)
    assert "model.mm_projector.0.weight" in found
    assert not found["model.mm_projector.0.weight"].any()


def test_a_batch_without_images_at_all_trains_the_text_alone(model, batch) -> None:
    text = {k: batch[k] for k in ("attention_mask", "labels")}
    text["input_ids"] = batch["input_ids"].masked_fill(batch["input_ids"] == -200, 7)
    assert math.isfinite(model.loss(text).item())


@pytest.mark.parametrize("stage", ["align", "lora", "full"])
def test_gradient_checkpointing_changes_no_gradient(golden, batch, lora, stage: str) -> None:
    found = []
    for is_checkpointed in (False, True):
        model = load_model(golden / "model")
        adapter = lora if stage == "lora" else {"kind": "full"}
        if stage != "align":
            apply_adapter(model, adapter, seed=1)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:  # at zero A would have no gradient to compare
                    torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        set_trainable(model, "align" if stage == "align" else "instruct", adapter)
        if is_checkpointed:
            model.enable_gradient_checkpointing()
        model.train()
        found.append(gradients(model, batch))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_gradient_checkpointing_recomputes(model, batch) -> None:
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append("mlp"))
    model.model.vlm_uni_aux_projector[1].register_forward_pre_hook(lambda *_: calls.append("mining"))
    model.enable_gradient_checkpointing()
    model.train()
    model.loss(batch).backward()
    assert calls.count("mlp") == 2 and calls.count("mining") == 2


def test_frozen_towers_stay_in_eval_mode_and_out_of_the_graph(model, batch) -> None:
    model.train()
    assert model.training and model.model.layers[0].training
    assert not any(m.training for m in model.model.vision_tower.modules())
    assert not any(m.training for m in model.model.vision_tower_aux.modules())
    assert not model.model.vision_tower(batch["images"]).requires_grad
    assert not model.model.vision_tower_aux(batch["images_aux"]).requires_grad


def test_a_tower_that_is_trained_gets_gradients(model, batch) -> None:
    model.model.vision_tower_aux.requires_grad_(True)
    model.train()
    assert model.model.vision_tower_aux.training
    found = gradients(model, batch)
    assert found["model.vision_tower_aux.vision_stem.0.weight"].any()


def test_loss_module_is_the_models_loss(still_model, batch) -> None:
    with torch.no_grad():
        assert torch.equal(LossModule(still_model)(batch, 4.0), still_model.loss(batch, 4.0))


def test_the_unused_last_clip_layer_is_not_run(still_model, batch) -> None:
    clip = still_model.model.vision_tower
    calls: list[int] = []
    hooks = [
        layer.register_forward_hook(lambda *_, i=i: calls.append(i))
        for i, layer in enumerate(clip.vision_tower.vision_model.encoder.layers)
    ]
    with torch.no_grad():
        clip(batch["images"])
    for hook in hooks:
        hook.remove()
    assert calls == [0, 1]
