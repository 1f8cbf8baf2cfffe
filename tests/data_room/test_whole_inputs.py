"""Rows for a model whose processor makes its inputs whole: counted by image size, refused by name, never replaced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mgm_exp.data import ImageTextDataset, read_records
from mgm_exp.data.curation import Policy, Source, curate
from mgm_exp.data.images import image_size
from mgm_exp.data.processor import InputsProcessor
from mgm_exp.data.whole_inputs import WholeInputsDataset
from mgm_exp.errors import DataError
from mgm_exp.model.hf.loading import open_processor
from tests.model.hf.tiny_models import paligemma, qwen2_vl


def _row(name: str, image: str | None, *texts: str) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": name, "conversations": turns, **({"image": image} if image else {})}


ROWS = [
    _row("small", "small.png", "<image>\nWhat is it?", "a sign"),
    _row("large", "large.png", "<image>\nWhat is it?", "a sign"),
    _row("text", None, "What colour?", "red"),
    _row("turns", "small.png", "<image>\nWhat is it?", "a sign", "red?", "no"),
    _row("end", "small.png", "<image>\nWhat is it?", "a <|im_end|> sign <eos>"),
    _row("long", "small.png", "<image>\n" + "What is it? " * 30, "a sign"),
]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    for name, size in {"small": (40, 30), "large": (120, 90)}.items():
        Image.new("RGB", size, (200, 30, 30)).save(tmp_path / f"{name}.png")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def _curated(rows: Path, processor: Any, out: Path) -> tuple[list[str], dict[str, str], dict[str, Any]]:
    out.mkdir()
    source = Source(rows, rows.parent, processor)
    report = curate({"align": source, "instruct": source}, out, policy=Policy(max_bad_share=0.9), workers=1)
    kept = [record.id for record in read_records(out / "instruct.jsonl")]
    lines = (out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    rejected = {row["id"]: row["kind"] for row in map(json.loads, lines) if row["stage"] == "instruct"}
    return kept, rejected, report.to_json()["instruct"]


def test_rows_that_a_model_cannot_take_are_named_and_left_out(rows: Path, tmp_path: Path) -> None:
    processor = open_processor(paligemma(tmp_path / "model"), 100)
    assert isinstance(processor, InputsProcessor)
    kept, rejected, _ = _curated(rows, processor, tmp_path / "out")
    assert kept == ["small", "large"]
    assert rejected == {
        "text": "unsupported_row",
        "turns": "unsupported_row",
        "end": "special_token",
        "long": "labels_truncated",
    }
    dataset = WholeInputsDataset(read_records(tmp_path / "out" / "instruct.jsonl"), rows.parent, processor)
    (rows.parent / "large.png").unlink()
    with pytest.raises(DataError, match=r"large\.png of record large cannot be read any more"):
        dataset[1]
    with pytest.raises(DataError, match=r"large\.png cannot be read any more"):
        image_size(rows.parent, "large.png")


def test_larger_images_have_more_tokens(rows: Path, tmp_path: Path) -> None:
    folder = qwen2_vl(tmp_path / "model")
    processor = open_processor(folder, 82)
    kept, rejected, report = _curated(rows, processor, tmp_path / "out")
    assert kept == ["small", "large", "text", "turns"]
    assert rejected == {"end": "special_token", "long": "labels_truncated"}
    dataset = WholeInputsDataset(read_records(tmp_path / "out" / "instruct.jsonl"), rows.parent, processor)
    lengths = [len(dataset[i]["input_ids"]) for i in range(len(dataset))]
    assert report["tokens"] == sum(lengths) and lengths[1] > lengths[0]
    assert dataset.has_image.tolist() == [True, True, False, True]
    assert dataset.lengths.tolist() == ImageTextDataset(dataset.records, rows.parent, None).lengths.tolist()  # type: ignore[arg-type]
