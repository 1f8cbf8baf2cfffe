"""The captioner of data=blip2 in the plan: its size, memory, images and hours, and what cannot be said of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mgm_exp.plan import CellPlan, plan_cell
from mgm_exp.plan.captioning import sizes_of
from tests.plan.settings import config_of

MGM = ("model=mgm_2b", "adapter=lora_r16", "data=blip2", "plan.device=rtx4090", "plan.rows=17500")
OPT = ("data.path=pairs.json", "data.captioner.path=/models/blip2-opt-2.7b", "plan.align_rows=17500")


def planned(*overrides: str) -> CellPlan:
    return plan_cell(config_of(*MGM, *overrides), with_advice=False)


def captions(*overrides: str) -> Any:
    return next(one for one in planned(*OPT, *overrides).phases if one.name == "captioning")


def test_a_known_captioner_has_its_published_size_and_hours() -> None:
    assert round(sizes_of("/models/blip2-opt-2.7b").parameters / 1e9, 2) == 3.74
    plan = planned(*OPT)
    found = plan.phases[0]
    assert (found.name, found.count) == ("captioning", 17_500)
    assert found.moments[0].total == 2 * sizes_of("blip2-opt-2.7b").parameters
    assert 0 < (plan.hours_of["captioning"] or 0) < 1
    assert plan.to_json()["phases"][0]["hours"] == pytest.approx(plan.hours_of["captioning"], abs=1e-4)
    assert plan.disk["captions"] > 0
    # One process writes captions, however many train
    assert planned(*OPT, "devices=4").hours_of["captioning"] == plan.hours_of["captioning"]


def test_batch_precision_and_further_captions_change_what_it_needs() -> None:
    plain, small, packed = (
        captions(),
        captions("data.captioner.batch_size=1"),
        captions("data.captioner.precision=int8"),
    )
    assert small.peak.total < plain.peak.total
    assert packed.moments[0].total < 0.6 * plain.moments[0].total
    more = captions("data.captioner.captions_per_image=2", "data.captioner.questions=['What is it?']")
    assert more.writes.steps == 3 * plain.writes.steps


def test_a_captioner_that_does_not_fit_is_advised_a_smaller_batch_or_int8() -> None:
    config = config_of(*MGM, *OPT, "data.captioner.path=/models/blip2-opt-6.7b", "data.captioner.batch_size=2000")
    found = plan_cell(config)
    assert found.verdict == "does not fit" and found.largest.name == "captioning"
    assert found.advice[0].startswith("data.captioner.batch_size=8: ") and "same result" in found.advice[0]


def test_what_is_not_known_of_a_captioner_is_said(tmp_path: Path) -> None:
    for overrides, words in (
        (["data.path=pairs.json"], "data.captioner.path is not set"),
        (["data.path=pairs.json", "data.captioner.path=/models/mine"], "none of blip2-opt-2.7b, blip2-opt-6.7b"),
        ([*OPT, "data.captioner.engine=data_juicer"], "Data-Juicer's own"),
    ):
        plan = planned(*overrides)
        assert all(one.name != "captioning" for one in plan.phases)
        assert any("captioning is not in the plan" in note and words in note for note in plan.notes)
    # No model, and one without a tower
    for name in ("nonsense", "fuyu"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": name}), encoding="utf-8")
        damaged = planned("data.path=pairs.json", f"data.captioner.path={folder}")
        assert any("cannot be used" in note for note in damaged.notes)
    # Captions that are there already cost nothing; raw ones neither
    assert all(one.name != "captioning" for one in planned("data.recaptioned_path=new.json", *OPT).phases)


def test_images_that_are_not_counted_leave_hours_out_and_say_so() -> None:
    steps = ("train.align.max_steps=50", "train.max_steps=50")
    plan = plan_cell(config_of("model=mgm_2b", "data=blip2", "plan.device=rtx4090", *OPT[:2], *steps))
    assert plan.phases[0].count is None and plan.hours is not None
    assert any("captioning: its hours" in note and "plan.align_rows" in note for note in plan.notes)


def test_a_tower_whose_image_is_described_by_both_sides_is_counted(tmp_path: Path) -> None:
    vision = {"image_size": [448, 448], "patch_size": [14, 14], "hidden_size": 64, "intermediate_size": 128,
              "num_hidden_layers": 2, "num_attention_heads": 2}  # fmt: skip
    text = {"model_type": "qwen2", "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
    content = {"model_type": "internvl", "vision_config": vision, "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8")
    found = sizes_of(str(tmp_path))
    assert (found.patches, found.vision_layers, found.width) == (32**2 + 1, 2, 32)


def test_the_folder_of_a_captioner_is_counted_without_weights(tmp_path: Path) -> None:
    from mgm_exp.data.captioner.demo_blip2 import demo_folder

    found = sizes_of(str(demo_folder(tmp_path)))
    assert found == sizes_of(None), "the demo's own, which is planned without writing it out"
    assert (found.layers, found.width, found.patches) == (2, 96, 257)
