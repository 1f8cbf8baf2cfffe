"""A run of ours as captioner: it says what the evaluation would hear, and draws by image and seed alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mgm_exp.data.captioner import CaptionSettings
from mgm_exp.errors import MissingDependencyError, ModelError
from mgm_exp.evaluate.captioner import MgmCaptioner, is_mgm
from mgm_exp.model import apply_adapter, load_model, load_processor, model_fingerprint, save_adapter

MODEL = Path(__file__).parents[1] / "data" / "mgm" / "model"
LORA = {"kind": "lora", "rank": 2, "alpha": 4, "dropout": 0.0, "target_modules": ["q_proj"]}
SETTINGS = CaptionSettings(max_new_tokens=8)
SEEDS = [3, 4, 5, 6]


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    draw = np.random.default_rng(0)
    sizes = [(40, 30), (64, 64), (30, 50), (90, 20)]
    return [Image.fromarray(draw.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


@pytest.fixture(scope="module")
def captioner() -> MgmCaptioner:
    torch.set_num_threads(1)
    return MgmCaptioner(MODEL, settings=SETTINGS)


def test_an_answer_is_that_of_the_model(captioner: MgmCaptioner, images: list[Image.Image]) -> None:
    model, processor = load_model(MODEL, dtype="float32"), load_processor(MODEL)
    expected = []
    for image in images:
        low, high = processor.pixels(image, "pad")
        ids = torch.tensor([processor.encode_prompt("what is it?")])
        written = model.generate(
            ids, images=low[None], images_aux=high[None], max_new_tokens=8, eos_token_id=processor.stop_token_ids
        )
        expected.append(" ".join(processor.decode(written[0]).split()))
    assert captioner.answer(images, ["what is it?"] * 4) == expected
    assert len(captioner.caption(images)) == 4
    assert captioner.can_answer and captioner.name == "MGM model"


def test_sampled_captions_depend_on_image_and_seed_alone(captioner: MgmCaptioner, images: list[Image.Image]) -> None:
    together = captioner.caption(images, seeds=SEEDS)
    assert captioner.caption(images, 3, seeds=SEEDS) == together
    assert captioner.caption(images[::-1], seeds=SEEDS[::-1]) == together[::-1]
    assert captioner.caption(images, seeds=[1, 2, 7, 8]) != together


def test_a_run_folder_is_told_from_other_models_and_its_adapter_is_applied(
    tmp_path: Path, captioner: MgmCaptioner, images: list[Image.Image]
) -> None:
    model = load_model(MODEL)
    apply_adapter(model, LORA, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=2.0, generator=torch.Generator().manual_seed(1))
    run = tmp_path / "run"
    save_adapter(model, run / "adapter")
    (run / "config.yaml").write_text(json.dumps({"model": {"name": "x", "path": str(MODEL)}}))
    assert is_mgm(run) and is_mgm(MODEL)
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    assert not is_mgm(tmp_path) and not is_mgm(tmp_path / "nothing")

    tuned = MgmCaptioner(run, settings=SETTINGS)
    assert tuned.caption(images) != captioner.caption(images)
    assert tuned.fingerprint() == model_fingerprint(model) != captioner.fingerprint()


def test_what_cannot_caption_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {name: tiny}\n")
    with pytest.raises(ModelError, match="neither model/ nor adapter/"):
        MgmCaptioner(tmp_path)
    with pytest.raises(MissingDependencyError, match="not loaded in 8 bits"):
        MgmCaptioner(MODEL, settings=CaptionSettings(precision="int8"))
