"""``mgm-exp suggest``: settings that fit, each with its reason, and the command that takes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mgm_exp.cli import main
from mgm_exp.compose import compose
from mgm_exp.plan import plan_cell
from mgm_exp.plan.cards import Device, verdict


def suggested(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    file = tmp_path / "suggestion.json"
    assert main(["suggest", *arguments, "--json", str(file)]) == 0
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def test_what_is_suggested_composes_fits_and_is_the_largest_batch_that_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = suggested(tmp_path, "--memory", "24", "--data", "2000")
    config = compose(["model=mgm_2b", *found["overrides"]])
    assert (config.adapter.rank, config.adapter.alpha, config.train.epochs) == (8, 16, 3)
    assert config.train.global_batch_size == 16, "375 steps of 16, where 128 would leave 47"
    card = Device("24 GB", 24 * 0.98, None)
    peak = plan_cell(config).peak_gib
    assert peak == pytest.approx(found["peak_gib"], abs=1e-3) and verdict(peak, card) == "fits"
    more = [f"train.micro_batch_size={2 * config.train.micro_batch_size}"]
    assert verdict(plan_cell(compose(["model=mgm_2b", *found["overrides"], *more])).peak_gib, card) != "fits"
    table = found["table"]
    assert list(table) == ["full", "LoRA r=8", "QLoRA r=8"]
    assert table["full"]["none"] > 40 and table["LoRA r=8"]["none"] == pytest.approx(peak, abs=0.01)
    assert table["QLoRA r=8"]["none"] < table["LoRA r=8"]["none"] and "zero=2" in table["QLoRA r=8"]["ZeRO-2"]
    assert all(choice["reason"] for choice in found["choices"])
    least = found["least"]
    assert list(least) == ["full", "LoRA r=8", "LoRA r=16", "QLoRA r=8", "QLoRA r=16"]
    full, lora = least["full"]["none"], least["LoRA r=16"]["none"]
    # 4 + 4 + 8 bytes of 2,519,431,424 parameters are 37.5 GiB, and 2 of each frozen one
    assert full["verdict"] == "does not fit" and full["state"] == pytest.approx(38.5, abs=0.1)
    assert lora["verdict"] == "fits" and lora["peak"] < 12
    assert least["full"]["ZeRO-3, offload"]["verdict"] == "fits" and "zero=2" in least["QLoRA r=8"]["ZeRO-2"]
    printed = capsys.readouterr().out
    assert "at least, with one sample" in printed and "does not fit" in printed
    assert "python -m mgm_exp model=mgm_2b devices=1 adapter=lora_r8" in printed


def test_what_is_suggested_cannot_be_fixed_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It would be overridden by the suggestion, and nothing would say so; what else is fixed is kept."""
    fixed = "train.freeze_connector=true"
    found = suggested(tmp_path, "--memory", "24", "--data", "2000", fixed)
    assert f" {fixed} adapter=lora_r8 " in capsys.readouterr().out
    for override in (*found["overrides"], "zero.stage=2", "adapter.rank=4", "++train.lr=1e-3", "devices=2"):
        assert main(["suggest", "--memory", "24", "--data", "2000", override]) == 2
        assert f"{override}: a suggestion has one of its own" in capsys.readouterr().err


def test_more_data_asks_for_a_higher_rank_and_more_cards_share_the_batch(tmp_path: Path) -> None:
    found = suggested(tmp_path, "--memory", "24", "--data", "1500000", "--devices", "8")
    config = compose(["model=mgm_2b", "devices=8", *found["overrides"]])
    # 1.5 M rows x 62 tokens x 1 bit / (2 bits x 1.2257 M weights a rank) = 37.9
    assert "37.9" in found["choices"][0]["reason"] and config.adapter.rank == 64
    assert config.train.epochs == 1 and config.train.global_batch_size == 128
    assert config.train.global_batch_size % (config.train.micro_batch_size * 8) == 0


def test_batches_are_shared_out_to_a_number_of_cards_that_is_no_power_of_two(tmp_path: Path) -> None:
    found = suggested(tmp_path, "--memory", "24", "--data", "20000", "--devices", "6")
    train = compose(["model=mgm_2b", "devices=6", *found["overrides"]]).train
    assert (train.global_batch_size, train.align.global_batch_size) == (192, 252)
    assert train.micro_batch_size == 2, "16 would go into 192 of 6 cards, and not into 252"


def test_too_little_memory_is_said_with_the_least_that_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["suggest", "--memory", "4", "--data", "1000"]) == 2
    error = capsys.readouterr().err
    assert "fits in 3.9 GiB; the least that was found is" in error and "adapter=qlora" in error
    assert main(["suggest", "--memory", "0", "--data", "1000"]) == 2
    assert "--memory 0.0 must be above 0" in capsys.readouterr().err
