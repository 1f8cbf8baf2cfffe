"""The shipped tiny base loads as any model folder, is in distribution with the product, and sees what its card says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import mgm_exp.model
from mgm_exp.data.demo.corpus import SceneSet, make_scenes
from mgm_exp.data.demo.teaching import normalised
from mgm_exp.model import load_model, load_processor
from mgm_exp.train.tiny.conversations import ConversationEncoder, base_rounds
from mgm_exp.train.tiny.measure import measure_captions, measure_reading
from mgm_exp.train.tiny.tokenizer import make_tokenizer
from mgm_exp.train.tiny.towers import low_resolution

FOLDER = Path(mgm_exp.model.__file__).parent / "tiny"


@pytest.fixture(scope="module")
def scenes() -> SceneSet:
    return make_scenes(40, seed=77, split="probe", random_share=0.0, workers=1)


def test_folder_is_small_and_holds_the_script_s_tokenizer() -> None:
    size = sum(p.stat().st_size for p in FOLDER.iterdir())
    assert size < 4_500_000
    assert json.loads((FOLDER / "tokenizer.json").read_text()) == json.loads(make_tokenizer().to_str())


def test_shipped_base_sees_about_as_well_as_its_card_says(scenes: SceneSet) -> None:
    model = load_model(FOLDER, dtype=torch.float32)
    model.eval()
    stated = json.loads((FOLDER / "recipe.json").read_text())["measures"]
    tokenizer = make_tokenizer()
    captions = measure_captions(model, tokenizer, scenes)
    assert captions["kind"] > 0.9 and captions["colour"] > 0.85
    # 80 texts: a standard error of about 4 points
    assert abs(captions["text"] - stated["captions"]["text"]) < 0.17
    assert abs(measure_reading(model, tokenizer, scenes) - stated["reading"]) < 0.17


def test_untouched_base_does_not_answer_demo_questions(scenes: SceneSet) -> None:
    from mgm_exp.train.tiny.measure import answer_all

    model = load_model(FOLDER, dtype=torch.float32)
    rows = [k for k, items in enumerate(scenes.items) if "sign" in {i.kind for i in items}][:16]
    part = SceneSet(
        *(getattr(scenes, n)[rows] for n in ("pixels", "positions", "cells", "slots")), [scenes.items[k] for k in rows]
    )
    answers = answer_all(model, make_tokenizer(), part, "what does the sign say?", max_new_tokens=12)
    texts = [next(i.text for i in items if i.kind == "sign") for items in part.items]
    assert sum(a == t for a, t in zip(answers, texts, strict=True)) <= 4


def test_base_was_taught_with_the_product_s_ids_labels_and_pixels(scenes: SceneSet) -> None:
    import random

    from mgm_exp.data.demo.scenes import Scene

    processor = load_processor(FOLDER)
    rounds = base_rounds(Scene(0, "probe", scenes.items[0], 0), random.Random(0), 4)
    turns = []
    for number, made in enumerate(rounds):
        turns.append({"from": "human", "value": ("<image>\n" if number == 0 else "") + made.request})
        turns.append({"from": "gpt", "value": made.answer})
    encoded = processor.encode(turns)
    assert (encoded["input_ids"], encoded["labels"]) == ConversationEncoder(make_tokenizer())(rounds)
    image, image_aux = processor.pixels(Image.fromarray(scenes.pixels[0]))
    expected = normalised(scenes.pixels[:1])
    assert torch.allclose(image_aux, expected[0], atol=1e-6)
    assert torch.allclose(image, low_resolution(expected, 64)[0], atol=1e-6)
