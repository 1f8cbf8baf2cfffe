"""Prompts, masks and pixels against the official ones, and what must hold for any text and any image."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_files import GOLDEN, edit_json
from PIL import Image
from safetensors.torch import load_file

from mgm_exp.errors import DataError, ModelError
from mgm_exp.model import IMAGE_TOKEN_INDEX, MGMProcessor, load_processor
from mgm_exp.model.processor import front_image

CONVERSATIONS = json.loads((GOLDEN / "conversations.json").read_text())
PIXELS = load_file(str(GOLDEN / "images" / "expected.safetensors"))


@pytest.fixture(scope="module")
def processor() -> MGMProcessor:
    return load_processor(GOLDEN / "model", model_max_length=128)


@pytest.mark.parametrize("entry", CONVERSATIONS["cases"], ids=lambda e: e["name"])
def test_prompt_ids_and_labels_equal_the_official_ones(processor: MGMProcessor, entry: dict) -> None:
    assert processor.prompt(entry["conversations"], entry["has_image"]) == entry["prompt"]
    encoded = processor.encode(entry["conversations"], entry["has_image"])
    assert encoded == {"input_ids": entry["input_ids"], "labels": entry["labels"]}


def test_a_text_only_row_equals_the_official_one(processor: MGMProcessor) -> None:
    collate = CONVERSATIONS["collate"]
    place = collate["rows"].index("no_image_text_only")
    ids = [i for i in collate["input_ids"][place] if i != CONVERSATIONS["pad_token_id"]]
    labels = collate["labels"][place][: len(ids)]
    text = processor.tokenizer.decode(ids)
    question = text.split("user\n")[1].split("<end_of_turn>")[0]
    answer = text.split("model\n")[1].split("<end_of_turn>")[0]
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    assert processor.encode(turns, has_image=False) == {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("entry", CONVERSATIONS["inference"], ids=["ocr", "choices"])
def test_inference_prompts_equal_the_official_ones(processor: MGMProcessor, entry: dict) -> None:
    assert processor.encode_prompt(entry["question"]) == entry["input_ids"]


@pytest.mark.parametrize("name", sorted(PIXELS))
def test_pixels_equal_the_official_ones(processor: MGMProcessor, name: str) -> None:
    aspect, picture, what = name.split(".")
    if "grid2" in aspect:
        grid = replace(processor.settings, image_grid=2, image_global=True, image_size_aux=256)
        processor = MGMProcessor(processor.tokenizer, grid, processor.patch_size, 128)
    if picture == "text":
        image, image_aux = processor.no_pixels()
    else:
        opened = Image.open(GOLDEN / "images" / f"{picture}.png")
        image, image_aux = processor.pixels(opened, aspect.split("_")[0])
    actual = {"image": image, "image_aux": image_aux, "image_aux_sub4": image_aux[:, ::4, ::4]}[what]
    torch.testing.assert_close(actual, PIXELS[name], atol=1e-6, rtol=0)


def turns(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": v} for i, v in enumerate(values)]


def test_two_images_in_one_turn_become_one(processor: MGMProcessor) -> None:
    ids = processor.encode(turns("<image>\nSame as <image>?", "yes"))["input_ids"]
    assert ids.count(IMAGE_TOKEN_INDEX) == 1
    assert ids == processor.encode(turns("<image>\nSame as ?", "yes"))["input_ids"]


def test_an_image_in_each_of_two_turns_stays_two(processor: MGMProcessor) -> None:
    ids = processor.encode(turns("<image>\nA?", "yes", "and <image>?", "no"))["input_ids"]
    assert ids.count(IMAGE_TOKEN_INDEX) == 2


@pytest.mark.parametrize(
    "values",
    [
        ("<image>\nWhat?", ""),
        ("<image>\nWhat?",),
        ("<image>\nWhat?", "red<eos>blue"),
        ("<image>\nsay <start_of_turn>model\nnow", "no"),
        (),
    ],
    ids=["empty answer", "no answer", "eos in the answer", "turn mark in the question", "no turns"],
)
def test_what_the_official_mask_gives_up_on_is_masked_and_not_refused(processor: MGMProcessor, values: tuple) -> None:
    encoded = processor.encode(turns(*values))
    assert set(encoded["labels"]) <= {-100}
    assert len(encoded["labels"]) == len(encoded["input_ids"])


def test_a_leading_answer_is_skipped(processor: MGMProcessor) -> None:
    later = turns("<image>\nWhat?", "red")
    assert processor.encode([{"from": "gpt", "value": "hello"}, *later]) == processor.encode(later)


def test_turns_that_do_not_alternate_are_named(processor: MGMProcessor) -> None:
    twice = [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]
    with pytest.raises(DataError, match="Turn 2"):
        processor.encode(twice)


def test_a_text_only_row_is_cut_and_an_image_row_is_not(processor: MGMProcessor) -> None:
    long = turns("word " * 200, "answer")
    assert len(processor.encode(long, has_image=False)["input_ids"]) == 128
    assert len(processor.encode(turns("<image>\n" + "word " * 200, "answer"))["input_ids"]) > 128


@settings(max_examples=60, deadline=None)
@given(
    question=st.text(max_size=40).filter(lambda t: "<" not in t),
    answer=st.text(min_size=1, max_size=40).filter(lambda t: "<" not in t),
    place=st.integers(0, 40),
)
def test_the_image_may_stand_anywhere_and_only_the_answer_is_learnt(processor, question, answer, place) -> None:
    place = min(place, len(question))
    value = question[:place] + "<image>" + question[place:]
    encoded = processor.encode(turns(value, answer))
    ids, labels = encoded["input_ids"], encoded["labels"]
    assert ids.count(IMAGE_TOKEN_INDEX) == 1
    assert ids[:5] == [2, 5, 759, 263, IMAGE_TOKEN_INDEX]
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    learnt = [label for label in labels if label != -100]
    if learnt:  # token merges over the template's edge make the official mask give up
        assert labels[-len(learnt) :] == learnt
        assert learnt[-3:] == [6, 263, 1]
    assert processor.encode(turns(front_image(value), answer)) == encoded


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=60))
def test_encoding_never_refuses_a_text(processor, text) -> None:
    for has_image in (True, False):
        encoded = processor.encode(turns(text, text), has_image=has_image)
        assert len(encoded["input_ids"]) == len(encoded["labels"]) > 0
        assert isinstance(processor.encode_prompt(text, has_image), list)


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 200),
    height=st.integers(1, 200),
    mode=st.sampled_from(["RGB", "L", "RGBA", "CMYK", "P", "LA", "1"]),
    aspect=st.sampled_from(["pad", "square"]),
)
def test_any_image_becomes_two_finite_tensors_of_fixed_size(processor, width, height, mode, aspect) -> None:
    image, image_aux = processor.pixels(Image.new(mode, (width, height)), aspect)
    assert image.shape == (3, 56, 56) and image_aux.shape == (3, 128, 128)
    assert image.dtype == image_aux.dtype == torch.float32
    assert torch.isfinite(image).all() and torch.isfinite(image_aux).all()


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    side=st.integers(1, 200),
    resample=st.sampled_from(list(Image.Resampling)),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_image_is_padded_and_then_resized(processor, width, height, side, resample, seed) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    own = copy.copy(processor)
    own.settings = replace(processor.settings, image_size_aux=side, resample=int(resample))
    longest = max(width, height)
    whole = np.empty((longest, longest, 3), np.uint8)
    whole[:] = [int(mean * 255) for mean in processor.settings.mean]
    top, left = (longest - height) // 2, (longest - width) // 2
    whole[top : top + height, left : left + width] = pixels
    expected = Image.fromarray(whole).resize((side, side), resample=resample)
    assert np.array_equal(own.square(Image.fromarray(pixels)), np.asarray(expected))


def test_a_very_wide_image_takes_no_square_of_its_width(processor: MGMProcessor) -> None:
    # 60,000 x 60,000 would be 14 GB
    assert processor.square(Image.new("RGB", (60_000, 8), "red")).shape == (128, 128, 3)


def test_an_unknown_aspect_is_named(processor: MGMProcessor) -> None:
    with pytest.raises(DataError, match="'stretch'"):
        processor.pixels(Image.new("RGB", (4, 4)), "stretch")


def test_decoding_drops_special_tokens_and_turn_marks(processor: MGMProcessor) -> None:
    answer = processor.encode(turns("<image>\nWhat?", "coca cola"))
    ids = [label for label in answer["labels"] if label != -100]
    assert processor.decode([*ids, 0, 0]) == "coca cola"
    assert processor.decode(torch.tensor([IMAGE_TOKEN_INDEX, *ids])) == "coca cola"


def test_turn_marks_that_are_not_special_are_dropped_too(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "model", tmp_path / "model")
    shutil.copytree(GOLDEN / "towers", tmp_path / "towers")
    path = tmp_path / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    for token in content["added_tokens"]:
        if token["content"] == "<end_of_turn>":
            token["special"] = False
    path.write_text(json.dumps(content))
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["6"]["special"] = False
    edit_json(
        tmp_path / "model" / "tokenizer_config.json",
        added_tokens_decoder=config["added_tokens_decoder"],
        additional_special_tokens=[],
    )
    (tmp_path / "model" / "special_tokens_map.json").unlink()
    assert load_processor(tmp_path / "model").decode([814, 559, 6, 263, 1]) == "coca cola"


def test_lengths_and_visual_tokens_come_from_the_folder(processor: MGMProcessor) -> None:
    assert load_processor(GOLDEN / "model").model_max_length == 256
    assert processor.n_visual_tokens == 16
    assert processor.stop_token_ids == [1, 6]
    assert processor.pad_token_id == 0


def test_a_folder_without_a_tokenizer_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        load_processor(folder)
