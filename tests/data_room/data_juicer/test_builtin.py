"""The builtin engine."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mgm_exp.data.data_juicer import Operator, Pair, measure_builtin
from mgm_exp.data.data_juicer.builtin import image_shape
from mgm_exp.errors import ConfigError, DataError

from .conftest import make_pairs, simple_operators, write_pairs


def values_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "values.jsonl").read_text(encoding="utf-8").splitlines()]


def test_values_by_hand(tmp_path: Path) -> None:
    root, _ = make_pairs(tmp_path, 1)
    caption = "the red red red label!"
    rows = write_pairs(tmp_path / "rows.jsonl", [Pair("x", caption, "0.png"), Pair("y", "", None)])
    report = measure_builtin(rows, root, simple_operators(), out=tmp_path)
    first, second = values_of(tmp_path)
    # Bigrams: the red, red red, red red, red label: two of four occur twice. 5-grams of characters: 18, of which
    # " red " three times, "red r", "ed re" and "d red" twice; of 13 distinct ones the sqrt, 3, count: 3 + 2 + 2.
    grams = [caption[i : i + 5] for i in range(len(caption) - 4)]
    assert sorted({gram for gram in grams if grams.count(gram) > 1}) == [" red ", "d red", "ed re", "red r"]
    assert first == {
        "id": "x", "words_num": 5, "text_length": 22, "word_repetition": 0.5, "character_repetition": 7 / 18,
        "image_width": 20, "image_height": 14,
    }  # fmt: skip
    assert second == {
        "id": "y", "words_num": 0, "text_length": 0, "word_repetition": 0.0, "character_repetition": 0.0,
        "image_width": None, "image_height": None,
    }  # fmt: skip
    assert (report.engine, report.rows, report.values) == ("builtin", 2, tuple(list(first)[1:]))


def test_progress_ends_at_the_end(tmp_path: Path) -> None:
    rows = write_pairs(tmp_path / "rows.jsonl", [Pair(str(i), "a", None) for i in range(2500)])
    told: list[tuple[str, int, int]] = []
    measure_builtin(
        rows, tmp_path, [Operator("words_num")], out=tmp_path, on_progress=lambda *a: told.append(a), total=2500
    )
    assert told == [("measure", 1000, 2500), ("measure", 2000, 2500), ("measure", 2500, 2500)]


def test_an_operator_with_a_model_needs_data_juicer(tmp_path: Path) -> None:
    rows = write_pairs(tmp_path / "rows.jsonl", [])
    with pytest.raises(ConfigError, match=r"data\.recipe\.engine=data_juicer"):
        measure_builtin(rows, tmp_path, [Operator("watermark", {"path": "m"})], out=tmp_path)
    assert not (tmp_path / "values.jsonl").exists()


def test_an_image_that_broke_names_itself(tmp_path: Path) -> None:
    root, pairs = make_pairs(tmp_path, 3)
    (root / "1.png").write_bytes(b"no image")
    rows = write_pairs(tmp_path / "rows.jsonl", pairs)
    with pytest.raises(DataError, match=r"row 2020-01-02 \(1\.png\)"):
        measure_builtin(rows, root, [Operator("image_shape")], out=tmp_path)


@settings(max_examples=40, deadline=None)
@given(
    orientation=st.integers(0, 9),
    image_format=st.sampled_from(["JPEG", "PNG", "TIFF", "WEBP"]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_shapes_are_those_of_the_images_that_data_juicer_loads(
    orientation: int, image_format: str, size: tuple[int, int]
) -> None:
    from datasets import Image as Decoder

    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    file = io.BytesIO()
    Image.new("RGB", size).save(file, image_format, exif=exif)
    loaded = Decoder().decode_example({"path": None, "bytes": file.getvalue()})
    assert image_shape(file.getvalue()) == loaded.size
