"""Data-Juicer's configuration of a recipe."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from mgm_exp.data.data_juicer import Operator, Pair, recipe_yaml, write_recipe
from mgm_exp.data.data_juicer.captioning import mapper_yaml
from mgm_exp.data.data_juicer.operators import KINDS

from .conftest import IN_A_TAR, make_pairs, simple_operators, write_pairs


def process(operator: Operator, limits: dict[str, Any] | None = None) -> dict[str, Any]:
    """The parameters of the one operator of a configuration."""
    (entry,) = yaml.safe_load(recipe_yaml([operator], limits))["process"]
    return dict(entry[operator.kind.filter])


def test_operators_on_captions_read_the_column_without_special_tokens() -> None:
    for name, kind in KINDS.items():
        operator = Operator(name, dict.fromkeys(kind.parameters, 2) if "ngram" in kind.parameters else
                            dict.fromkeys(kind.parameters, "/model"))  # fmt: skip
        assert process(operator).get("text_key") == ("caption" if kind.reads == {"caption"} else None)


def test_without_limits_no_default_of_data_juicers_remains() -> None:
    """min_num is 10 there, min_len 10, max_ratio 0.5, min_score 0.1 and 0.003, prob_threshold 0.8."""
    found = {name: process(Operator(name, {"path": "/m"})) for name in ("image_text_similarity", "watermark")}
    assert found["image_text_similarity"]["min_score"] < -1 and found["image_text_similarity"]["max_score"] > 1
    assert found["watermark"]["prob_threshold"] > 1
    words = process(Operator("words_num"))
    assert words["min_num"] == 0 and words["max_num"] > 10**9
    for operator in simple_operators():
        assert {names.min for names in operator.kind.values.values()} <= set(process(operator))
        assert {names.max for names in operator.kind.values.values()} <= set(process(operator))


@pytest.mark.parametrize(
    ("limits", "expected"), [({"min": 3.2}, (4, None)), ({"min": 4, "max": 9.9}, (4, 9)), ({"max": 7}, (0, 7))]
)
def test_limits_of_whole_values_are_whole(limits: dict[str, float], expected: tuple[int, int | None]) -> None:
    found = process(Operator("words_num"), {"words_num": limits})
    assert found["min_num"] == expected[0] and isinstance(found["min_num"], int)
    assert expected[1] is None or found["max_num"] == expected[1]


def test_a_limit_keeps_its_digits() -> None:
    for number in (2 / 3, 1e-5, 0.1 + 0.2):
        limits = {"character_repetition": {"max": number}}
        assert process(Operator("character_repetition", {"ngram": 5}), limits)["max_ratio"] == number


def test_the_percentile_of_no_values_lets_nothing_through() -> None:
    found = process(Operator("words_num"), {"words_num": {"min": math.nan, "max": math.nan}})
    assert found["min_num"] > found["max_num"]
    assert process(Operator("watermark", {"path": "/m"}), {"watermark": {"max": math.nan}})["prob_threshold"] < 0


def test_what_loses_rows_installs_or_writes_elsewhere_is_off() -> None:
    for text in (recipe_yaml(simple_operators()), mapper_yaml(Path("m"), batch_size=4, prompt=None)):
        settings = yaml.safe_load(text)
        assert [settings[key] for key in ("skip_op_error", "open_monitor", "use_cache", "use_checkpoint")] == [
            False
        ] * 4
        assert settings["auto_op_parallelism"] is False and settings["np"] == 1
        assert settings["job_id"]


def test_the_mapper_keeps_one_row_for_one_row() -> None:
    (entry,) = yaml.safe_load(mapper_yaml(Path("m"), batch_size=4, prompt="a sign"))["process"]
    mapper = entry["image_captioning_mapper"]
    assert (mapper["keep_original_sample"], mapper["caption_num"], mapper["prompt"]) == (False, 1, "a sign")
    assert mapper["batch_size"] == mapper["gpu_batch_size"] == 4
    assert mapper["hf_img2seq"] == str(Path("m").absolute())


def test_the_rows_of_a_recipe_have_absolute_images_and_texts_that_stay_texts(tmp_path: Path) -> None:
    from pyarrow import parquet

    root, pairs = make_pairs(tmp_path / "data")
    rows = write_pairs(tmp_path / "rows.jsonl", pairs)
    write_recipe(tmp_path, rows, root, simple_operators(), {})
    found = parquet.read_table(tmp_path / "recipe_pairs.parquet").to_pylist()
    # "2020-01-01" is no date, and what has no image comes last.
    assert [row["id"] for row in found] == [pair.id for pair in sorted(pairs, key=lambda pair: pair.image is None)]
    assert found[0]["images"] == [str(root / "0.png")]
    assert found[0]["text"] == f"<__dj__image>\n{pairs[0].caption} <|__dj__eoc|>"
    assert found[0]["caption"] == pairs[0].caption
    assert found[4]["caption"] == "hello you"
    assert found[-1]["images"] == [] and "<" not in found[-1]["text"]
    (unpacked,) = found[IN_A_TAR - 1]["images"]  # relative, as the folder may be moved
    assert (tmp_path / unpacked).read_bytes() == (root / f"{IN_A_TAR}.png").read_bytes()


def test_no_image_is_unpacked_for_a_recipe_that_reads_none(tmp_path: Path) -> None:
    root, pairs = make_pairs(tmp_path / "data")
    rows = write_pairs(tmp_path / "rows.jsonl", pairs)
    write_recipe(tmp_path, rows, root, [Operator("words_num")], {})
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("recipe")) == [
        "recipe.yaml",
        "recipe_pairs.parquet",
    ]


def test_an_image_outside_the_root_does_not_get_into_a_recipe(tmp_path: Path) -> None:
    rows = write_pairs(tmp_path / "rows.jsonl", [Pair("1", "a", "../secret.png")])
    with pytest.raises(Exception, match="outside_root"):
        write_recipe(tmp_path, rows, tmp_path / "images", [Operator("image_shape")], {})
    assert not (tmp_path / "recipe_pairs.parquet").exists()
