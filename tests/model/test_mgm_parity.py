"""The model against the official code's numbers, step by step. atol 2e-5 tells the erf from the tanh GELU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mgm_exp.model import MGMForConditionalGeneration, build_model, load_model
from mgm_exp.model.mining import mine

ATOL = 2e-5
CASES = ["basic", "row_without_image", "grid2_global"]
Case = Callable[[str], dict[str, Tensor]]


@pytest.fixture(params=CASES)
def named_case(request: pytest.FixtureRequest, case: Case, golden: Path) -> tuple[str, dict[str, Tensor], dict]:
    override = json.loads((golden / "cases.json").read_text())[request.param]["config_override"]
    return request.param, case(request.param), override


@pytest.fixture
def configured(model: MGMForConditionalGeneration, named_case: tuple) -> MGMForConditionalGeneration:
    for key, value in named_case[2].items():
        setattr(model.config, key, value)  # read at call time
    return model


def run(model: MGMForConditionalGeneration, t: dict[str, Tensor], **kwargs: bool) -> object:
    with torch.no_grad():
        return model(
            t["input_ids"],
            t["attention_mask"],
            images=t["images"],
            images_aux=t["images_aux"],
            labels=t["labels"],
            **kwargs,
        )


def close(actual: Tensor, expected: Tensor, atol: float = ATOL) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def test_merged_logits_loss_masks_and_embeddings_equal_the_official_ones(configured, named_case) -> None:
    _, t, _ = named_case
    out = run(configured, t)
    with torch.no_grad():
        embeds, mask, labels = configured.merge(
            t["input_ids"], t["attention_mask"], t["labels"], images=t["images"], images_aux=t["images_aux"]
        )
    real = t["merged_attention_mask"]
    assert torch.equal(mask, real)
    assert torch.equal(labels, t["merged_labels"])
    close(embeds / configured.config.embed_scale, t["inputs_embeds"])
    close(out.logits[real], t["logits"][real])
    close(out.loss.reshape(1), t["loss"])


def test_visual_tokens_equal_the_official_ones(configured, named_case) -> None:
    _, t, _ = named_case
    with torch.no_grad():
        close(configured.model.encode_images(t["images"], t["images_aux"]), t["projected_features"])
        configured.model.mines_natively = False
        close(configured.model.encode_images(t["images"], t["images_aux"]), t["projected_features"])


def test_towers_equal_the_official_ones(still_model: MGMForConditionalGeneration, case: Case) -> None:
    t = case("basic")
    with torch.no_grad():
        close(still_model.model.vision_tower(t["images"]), t["lr_features"])
        close(still_model.model.vision_tower_aux(t["images_aux"]), t["hr_features"])


def test_native_stages_are_the_concatenation_before_upsampling(still_model, case: Case) -> None:
    t = case("basic")
    with torch.no_grad():
        stages = still_model.model.vision_tower_aux.stages(t["images_aux"])
    assert [tuple(s.shape[1:]) for s in stages] == [(8, 32, 32), (12, 16, 16), (16, 8, 8), (24, 4, 4)]
    close(stages[0], t["hr_features"][:, :8])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_mined_detail_equals_the_official_one(
    mode: Callable[[], Any], still_model: MGMForConditionalGeneration, case: Case
) -> None:
    """Inference mode takes a shorter way (no keys and values of all pixels)."""
    t, m = case("basic"), still_model.model
    with mode():
        mined = mine(
            t["lr_features"],
            t["hr_features"],
            m.vlm_uni_query_projector,
            m.vlm_uni_aux_projector,
            m.vlm_uni_val_projector,
        )
    close(mined, t["mined_features_0"])


def test_hidden_states_equal_the_official_ones(still_model: MGMForConditionalGeneration, case: Case) -> None:
    t = case("basic")
    states = run(still_model, t, output_hidden_states=True).hidden_states
    real = t["merged_attention_mask"]
    close(states[0][real], t["hidden_0_after_normalizer"][real])
    close(states[-1][real], t["hidden_last"][real])


def test_tanh_gelu_gives_the_official_tanh_numbers(golden: Path, case: Case) -> None:
    section = {"path": str(golden / "model"), "hidden_activation": "gelu_pytorch_tanh"}
    model, report = build_model(section)
    t = case("basic")
    out = run(model, t)
    real = t["merged_attention_mask"]
    assert report.activation == "gelu_pytorch_tanh"
    close(out.logits[real], t["logits_tanh"][real])
    close(out.loss.reshape(1), t["loss_tanh"])
    assert (out.logits - t["logits"])[real].abs().max() > 1e-4  # the two forms can be told apart


def test_image_features_are_scaled_by_sqrt_hidden(still_model: MGMForConditionalGeneration, case: Case) -> None:
    t = case("basic")
    embeds, _, _ = still_model.merge(t["input_ids"], t["attention_mask"], visual_tokens=t["projected_features"])
    row = t["input_ids"][0][t["attention_mask"][0]]
    place = int((row == -200).nonzero())
    close(embeds[0, place : place + 16], t["projected_features"][0] * 8.0)


def test_gradients_equal_the_official_ones(model: MGMForConditionalGeneration, case: Case, golden: Path) -> None:
    from safetensors.torch import load_file

    t = case("basic")
    model.loss(t).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    norms = json.loads((golden / "grad_norms_basic.json").read_text())
    assert set(gradients) == set(norms)  # towers frozen, all 36 others reached
    for name, norm in norms.items():
        assert float(gradients[name].norm()) == pytest.approx(norm, rel=1e-4, abs=1e-6), name
    for name, gradient in load_file(str(golden / "grads_basic.safetensors")).items():
        close(gradients[name], gradient, atol=2e-6)


def test_names_and_shapes_are_the_official_ones(still_model: MGMForConditionalGeneration, golden: Path) -> None:
    expected = json.loads((golden / "state_dict_names.json").read_text())
    actual = {name: list(t.shape) for name, t in still_model.state_dict().items()}
    assert actual == {name: entry["shape"] for name, entry in expected.items()}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_kernels_agree_with_the_official_numbers(golden: Path, case: Case, attention: str) -> None:
    model = load_model(golden / "model", attn_implementation=attention)
    assert model.load_report.attention == attention
    t = case("row_without_image")
    real = t["merged_attention_mask"]
    close(run(model, t).logits[real], t["logits"][real])


def test_bf16_stays_near_the_official_fp32(golden: Path, case: Case) -> None:
    model = load_model(golden / "model", dtype="bfloat16")
    t = case("basic")
    out = run(model, t)
    real = t["merged_attention_mask"]
    assert out.logits.dtype == torch.float32
    close(out.logits[real], t["logits"][real], atol=0.1)
