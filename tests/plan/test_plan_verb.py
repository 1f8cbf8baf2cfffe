"""``mgm-exp plan``: every cell before anything starts, and 3 where one does not fit."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mgm_exp.cli import main
from mgm_exp.plan import plan_cell, predicted_hours, predicted_memory_gib
from mgm_exp.verbs.plan import show
from tests.plan.settings import config_of

KEYS = "overrides parameters memory_gib steps tokens flops hours cost disk_gib verdict advice".split()
PARTS = "llm vision_tower vision_tower_aux mining projector lora total trainable".split()
MEMORY = "weights gradients optimizer activations logits buffers peak".split()
MGM = ("model=mgm_2b", "plan.device=rtx4090", "plan.rows=17500", "plan.align_rows=17500")


def planned(tmp_path: Path, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    file = tmp_path / "plan.json"
    code = main(["plan", *arguments, "--json", str(file)])
    return code, json.loads(file.read_text(encoding="utf-8"))["cells"]


def test_on_24_gb_lora_fits_and_full_fine_tuning_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, cells = planned(tmp_path, *MGM, "adapter=full,lora_r16", "plan.price=0.5", "--explain")
    assert code == 3
    full, lora = cells
    for cell in cells:
        assert [key for key in KEYS if key not in cell] == []
        assert set(cell["parameters"]) == set(PARTS) and set(cell["memory_gib"]) == set(MEMORY)
        parts = [value for name, value in cell["memory_gib"].items() if name != "peak"]
        assert sum(parts) == pytest.approx(cell["memory_gib"]["peak"], abs=1e-3), "what is alive at the peak adds up"
    state = sum(full["memory_gib"][part] for part in ("weights", "gradients", "optimizer"))
    assert full["verdict"] == "does not fit" and state * 1024**3 / 1e9 == pytest.approx(41.3, abs=0.1)
    assert any("adapter=lora_r16" in line for line in full["advice"])
    assert lora["verdict"] == "fits" and lora["advice"] == []
    assert lora["parameters"]["lora"] == 19_611_648
    assert lora["steps"] == 69 + 137 and lora["tokens"] == (69 * 256 + 137 * 128) * 700
    assert lora["cost"] == pytest.approx(lora["hours"] * 0.5, abs=0.01)
    output = capsys.readouterr().out
    assert "backward of mining" in output and "16" in output and "note: the sizes of MGM-2B" in output


def test_a_cell_that_cannot_be_run_does_not_hide_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, cells = planned(tmp_path, "plan.device=a10", "train.micro_batch_size=16,5")
    assert code == 2
    assert [cell["overrides"] for cell in cells] == [["train.micro_batch_size=16"]]
    refused = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))["refused"]
    assert [cell["overrides"] for cell in refused] == [["train.micro_batch_size=5"]]
    assert "cannot run: train.micro_batch_size=5: " in capsys.readouterr().out


@pytest.mark.parametrize("verb", [["plan"], ["suggest", "--memory", "24", "--data", "10"]], ids=["plan", "suggest"])
def test_where_no_file_can_be_written_is_said_before_the_work(
    verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, says in ((".", "is a folder"), ("none/plan.json", "none is not a folder")):
        assert main([*verb, "--json", str(tmp_path / name)]) == 2
        printed = capsys.readouterr()
        assert says in printed.err and printed.out == ""


def test_names_in_brackets_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    questions = ("eval.textvqa.batch_size=2048", "plan.prices={rtx4090: 1, currency: '[/]'}")
    show([plan_cell(config_of(*MGM, "adapter=lora_r16", *questions))])
    printed = capsys.readouterr().out
    assert "evaluate[textvqa], reading the prompts" in " ".join(printed.split()) and " [/] " in printed


@pytest.mark.parametrize("width", [60, 120, 240])
def test_a_narrow_terminal_loses_no_column_and_no_digit(width: int) -> None:
    file = io.StringIO()
    plan = plan_cell(config_of(*MGM, "adapter=lora_r16"), ["adapter=lora_r16", "train.lr=2e-4"])
    show([plan], console=Console(file=file, width=width, force_terminal=True, color_system=None))
    printed = " ".join(file.getvalue().split())
    for words in ("adapter=lora_r16 train.lr=2e-4", "3,038.8", "206", "disk GiB"):
        assert words in printed
    assert ("fits in RTX 4090" in printed) and (("steps 206" in printed) == (width < 200))


def test_a_single_run_that_fits_ends_with_0(tmp_path: Path) -> None:
    code, cells = planned(tmp_path, "plan.device=a10")
    assert code == 0
    assert cells[0]["verdict"] == "fits" and cells[0]["memory_gib"]["peak"] < 1
    assert cells[0]["steps"] == 80 + 60


def test_what_is_not_known_is_null_with_its_reason(tmp_path: Path) -> None:
    _, cells = planned(tmp_path, "model=mgm_2b", "data.path=nowhere.json", "plan.device=h200")
    cell = cells[0]
    assert (cell["steps"], cell["tokens"], cell["flops"], cell["hours"], cell["cost"]) == (None,) * 5
    assert any("plan.rows" in note for note in cell["notes"])
    assert cell["memory_gib"]["peak"] > 5, "memory does not need the data"


def test_steps_of_generated_data_are_not_taken_for_those_of_ones_own() -> None:
    said = plan_cell(config_of("model=mgm_2b")).notes
    assert any("generated demo data" in note and "plan.rows" in note for note in said)
    for known in ("plan.rows=1000", "data.path=rows.json"):
        assert not any("generated" in note for note in plan_cell(config_of("model=mgm_2b", known)).notes)


def test_a_model_without_sizes_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "model.name=other", "model.path=/nowhere"]) == 2
    assert "model.path=/nowhere holds no config.json" in capsys.readouterr().err
    assert main(["plan", "train.lrr=1"]) == 2
    assert "Did you mean train.lr?" in capsys.readouterr().err


def test_the_known_models_are_planned_without_files(tmp_path: Path) -> None:
    code, cells = planned(tmp_path, "model=mgm_13b", "adapter=lora_r16", "zero=3", "devices=8", "plan.device=a100_80")
    assert code == 0
    assert (cells[0]["parameters"]["llm"], cells[0]["parameters"]["lora"]) == (13_015_864_320, 62_586_880)
    assert any("sizes of MGM-13B are taken" in note for note in cells[0]["notes"])
    short = ["adapter=lora_r16", "train.micro_batch_size=1", "train.align.max_steps=0"]
    hd, plain = (config_of(f"model={name}", *short) for name in ("mgm_2b_hd", "mgm_2b"))
    assert plan_cell(hd).sizes.visual_tokens == 5 * plan_cell(plain).sizes.visual_tokens == 2880
    assert predicted_memory_gib(hd) > predicted_memory_gib(plain)
    asked = config_of("model=mgm_2b", "model.image_grid=2", "model.image_size_aux=1536")
    assert plan_cell(asked).sizes.visual_tokens == 4 * 576


def test_micro_batch_and_checkpointing_are_advised_before_another_adapter() -> None:
    config = config_of(*MGM, "adapter=lora_r16", "model.gradient_checkpointing=false", "train.micro_batch_size=16")
    found = plan_cell(config)
    assert found.verdict == "does not fit"
    assert found.advice and found.advice[0].startswith("train.micro_batch_size=2 ")


def test_sharding_over_more_cards_needs_less_on_each() -> None:
    def needs(*overrides: str) -> float:
        return predicted_memory_gib(config_of(*MGM, "adapter=full", *overrides))

    assert needs() > needs("zero=2", "devices=2") > needs("zero=2", "devices=8") > needs("zero=3", "devices=8")
    assert needs("zero=2", "zero.offload_optimizer=cpu") < needs("zero=2")


def test_hours_need_a_card_whose_speed_is_known() -> None:
    assert predicted_hours(config_of("model=mgm_2b", "plan.rows=100", "plan.align_rows=100")) is None
    assert predicted_hours(config_of(*MGM)) == pytest.approx(
        2 * predicted_hours(config_of(*MGM, "devices=2")), rel=0.01
    )  # type: ignore[operator]


def test_the_disk_of_kept_features_is_counted() -> None:
    def gigabytes(*overrides: str) -> float:
        return plan_cell(config_of(*MGM, "adapter=lora_r16", *overrides), with_advice=False).disk_gib * 1024**3 / 1e9

    plain, halves = gigabytes(), gigabytes("zero=2")
    two_stages = 2 * 17_500 / 1e9
    for tier, each in (("clip", 576 * 1024), ("towers", 576 * 1024 + 13_271_040)):
        # Under autocast at most: some of it comes out in fp32
        assert gigabytes(f"train.feature_cache={tier}") - plain == pytest.approx(4 * each * two_stages, rel=1e-3)
        assert gigabytes(f"train.feature_cache={tier}", "zero=2") - halves == pytest.approx(2 * each * two_stages, 1e-3)
    few, kept = ("train.max_steps=10", "train.align.max_steps=0"), "train.feature_cache=clip"  # of 128 rows
    read = 4 * 576 * 1024 * 10 * 128 / 1e9
    assert gigabytes(*few, kept) - gigabytes(*few) == pytest.approx(read, rel=1e-3), "of images that no step reads none"
    frozen = ("train.freeze_connector=true", "train.feature_cache=tokens")
    expected = 2 * 576 * 2048 * 17_500 / 1e9
    assert gigabytes(*frozen) - gigabytes(frozen[0]) == pytest.approx(expected, rel=1e-3)
    budget = ("train.feature_cache=auto", "train.feature_cache_gb=100")
    assert gigabytes(*budget) - plain == pytest.approx(4 * 576 * 1024 * two_stages, rel=1e-3), (
        "clip fits, towers do not"
    )
    assert gigabytes("train.resized_cache_gb=10") - plain == pytest.approx(10, rel=1e-3)
