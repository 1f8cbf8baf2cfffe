"""Rows, images and models that Data-Juicer's operators are tried on, and one run of all operators that tests share."""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mgm_exp.data.data_juicer import MeasureReport, Operator, Pair, measure

from ..conftest import picture

CAPTIONS = [
    "a red sign that reads open 24 h",
    "a a a a",
    "2021-01-01",
    "the red red red red label label label 3 !!",
    "<__dj__image>\nhello you <|__dj__eoc|>",
    "",
    "ab\tcd\n\nab cd  ab cd 🙂 «éé» Ünïcode ﬁ",
    "green " * 40,
    "a sign above a blue sign",
]
ON_ITS_SIDE = 4
WITHOUT_IMAGE = 5
IN_A_TAR = 7


@dataclass(frozen=True)
class Measured:
    """A folder with rows, and what Data-Juicer measured."""

    rows: Path
    root: Path
    pairs: list[Pair]
    operators: tuple[Operator, ...]
    report: MeasureReport
    values: list[dict[str, Any]]
    content: bytes
    work: Path


def write_pairs(path: Path, pairs: list[Pair]) -> Path:
    path.write_text("".join(json.dumps(pair.to_json()) + "\n" for pair in pairs), encoding="utf-8")
    return path


def make_pairs(folder: Path, number: int = len(CAPTIONS)) -> tuple[Path, list[Pair]]:
    """Images below ``folder/images`` and as many pairs; the ids look like dates."""
    root = folder / "images"
    root.mkdir(parents=True)
    pairs = []
    for i in range(number):
        name = f"{i}.png"
        picture(20 + i, 14, seed=i).save(root / name)
        if i == ON_ITS_SIDE:
            name = f"{i}.jpg"
            exif = Image.Exif()
            exif[0x0112] = 6
            picture(20 + i, 14, seed=i).save(root / name, exif=exif)
        if i == IN_A_TAR:
            with tarfile.open(root / "shard.tar", "w") as tar:
                tar.add(root / name, arcname="in/a/tar.png")
            name = "shard.tar::in/a/tar.png"
        image = None if i == WITHOUT_IMAGE else name
        pairs.append(Pair(f"2020-01-{i + 1:02d}", CAPTIONS[i % len(CAPTIONS)], image))
    return root, pairs


def watermark_folder(folder: Path) -> Path:
    """An image classifier with two classes."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(2)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=2, initializer_range=1.0)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Operator -> the folder of its model."""
    from ..tiny_models import blip_matching_folder, clip_folder

    folder = tmp_path_factory.mktemp("models")
    return {
        "image_text_similarity": clip_folder(folder / "clip"),
        "image_text_matching": blip_matching_folder(folder / "blip"),
        "watermark": watermark_folder(folder / "watermark"),
    }


def simple_operators() -> tuple[Operator, ...]:
    """Those without a model."""
    return (
        Operator("words_num"),
        Operator("text_length"),
        Operator("word_repetition", {"ngram": 2}),
        Operator("character_repetition", {"ngram": 5}),
        Operator("image_shape"),
    )


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]) -> Measured:
    """All eight operators on nine rows in two shards, by Data-Juicer."""
    folder = tmp_path_factory.mktemp("measured rows")  # with a blank
    root, pairs = make_pairs(folder)
    rows = write_pairs(folder / "rows.jsonl", pairs)
    operators = (*simple_operators(), *(Operator(name, {"path": str(path)}) for name, path in models.items()))
    out = folder / "out"
    out.mkdir()
    report = measure(rows, root, operators, work=folder / "work", out=out, shard_rows=5)
    content = (out / "values.jsonl").read_bytes()
    values = [json.loads(line) for line in content.splitlines()]
    return Measured(rows, root, pairs, operators, report, values, content, folder / "work")
