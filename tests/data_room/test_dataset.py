from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mgm_exp.config import Aspect
from mgm_exp.data import ImageTextDataset, Record, Turn, VisualTokens, collate, write_visual_tokens
from mgm_exp.errors import DataError

from .conftest import GOLDEN


def record(name: str, image: str | None, answer: str = "red") -> Record:
    token = "" if image is None else "<image>\n"
    return Record(name, image, (Turn("human", f"{token}What is it?"), Turn("gpt", answer)))


@pytest.mark.parametrize("aspect", Aspect)
def test_pixels_are_those_of_the_official_code(processor: Any, aspect: Aspect) -> None:
    expected = load_file(GOLDEN / "images" / "expected.safetensors")
    names = [key.split(".")[1] for key in expected if key.startswith(f"{aspect.value}.") and key.endswith(".image")]
    names = [name for name in names if name != "text"]
    assert len(names) >= 2
    records = [record(name, f"{name}.png") for name in names]
    dataset = ImageTextDataset(records, GOLDEN / "images", processor, aspect)
    for i, name in enumerate(names):
        assert torch.allclose(dataset[i]["image"], expected[f"{aspect.value}.{name}.image"].float(), atol=1e-6, rtol=0)


def test_a_text_only_record_carries_zeros_beside_pictures(processor: Any, root: Path) -> None:
    dataset = ImageTextDataset([record("a", "0.png"), record("b", None)], root, processor)
    batch = collate([dataset[0], dataset[1]], processor.pad_token_id)
    assert batch["images"][0].any() and not batch["images"][1].any() and not batch["images_aux"][1].any()
    assert (batch["input_ids"] == -200).sum(1).tolist() == [1, 0]


def test_examples_hold_what_the_processor_encodes_cut_to_its_length(processor: Any, root: Path) -> None:
    dataset = ImageTextDataset([record("a", "0.png", "word " * 200), record("b", None)], root, processor)
    for _ in range(2):  # the second time from memory
        encoded = processor.encode(dataset.records[0].turns())
        example = dataset[0]
        assert example["input_ids"].tolist() == encoded["input_ids"][:128]
        assert example["labels"].tolist() == encoded["labels"][:128]
        assert example["input_ids"].dtype == torch.long


def test_lengths_are_the_words_that_the_official_sampler_counts(processor: Any, root: Path) -> None:
    dataset = ImageTextDataset([record("a", "0.png", "a red sign"), record("b", None)], root, processor)
    assert dataset.lengths.tolist() == [7, 4] and dataset.has_image.tolist() == [True, False]


def test_an_image_that_is_gone_is_named_and_not_replaced(processor: Any, root: Path) -> None:
    dataset = ImageTextDataset([record("a", "0.png"), record("b", "1.png")], root, processor)
    os.remove(root / "1.png")
    dataset[0]
    with pytest.raises(DataError, match=r"1\.png of record b .*missing"):
        dataset[1]


def test_cached_visual_tokens_are_read_in_place_of_images(processor: Any, root: Path, tmp_path: Path) -> None:
    tokens = {"0.png": torch.full((4, 3), 1.5), "1.png": torch.full((4, 3), 2.5)}
    write_visual_tokens(tokens, lambda names: torch.stack([tokens[name] for name in names]), tmp_path)
    records = [record("a", "1.png"), record("b", None), record("c", "2.png")]
    dataset = ImageTextDataset(records, root, processor, visual_tokens=VisualTokens(tmp_path))
    batch = collate([dataset[0], dataset[1]], 0)
    assert batch["visual_tokens"].shape == (2, 4, 3) and "images" not in batch
    assert batch["visual_tokens"][:, 0, 0].tolist() == [2.5, 0.0]
    with pytest.raises(DataError, match=r"2\.png has no visual tokens"):
        dataset[2]
