"""Money by the user's own table, for a cell and for the whole sweep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mgm_exp.cli import main
from mgm_exp.compose import compose
from mgm_exp.config import Card, PlanConfig
from mgm_exp.errors import ConfigError
from mgm_exp.plan.prices import Price, price_of, prices_of

CELL = ("train.align.max_steps=4", "train.max_steps=4", "eval.demo.baselines=false")


def test_a_table_is_a_file_or_a_mapping(tmp_path: Path) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text("currency: EUR\na10: 0.6\nh100: {price: 2.5, currency: USD}\n", encoding="utf-8")
    expected = {Card.a10: Price(0.6, "EUR"), Card.h100: Price(2.5, "USD")}
    assert prices_of(PlanConfig(prices=str(file))) == expected
    plain = tmp_path / "prices.json"
    plain.write_text(json.dumps({"currency": "EUR", "a10": 0.6}), encoding="utf-8")
    assert prices_of(PlanConfig(prices=str(plain))) == {Card.a10: Price(0.6, "EUR")}
    section = compose(["plan.prices={a10: 0.6, h100: {price: 2.5, currency: USD}, currency: EUR}"]).plan
    assert prices_of(section) == expected
    assert price_of(PlanConfig(device=Card.h100, prices=str(file))) == Price(2.5, "USD")
    assert price_of(PlanConfig(device=Card.l40s, prices=str(file))) is None
    assert price_of(PlanConfig(device=Card.a10, prices=str(file), price=9.0)) == Price(9.0, "EUR")
    assert price_of(PlanConfig()) is None, "none is shipped"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("h100x: 2", "no card"),
        ("h100: -2", "above 0"),
        ("h100: true", "above 0"),
        ("h100: .nan", "above 0"),
        ("h100: {cost: 2}", "allowed are price"),
        ("- h100", "no prices by card"),
        ("currency: 3", "must be a name"),
        (r'currency: "\e[2J"', "must be a name"),
        (f"h100: {{price: 1, currency: {'E' * 99}}}", "a currency a name"),
        ("h100: [", "cannot be read"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(tmp_path: Path, content: str, says: str) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=says):
        prices_of(PlanConfig(prices=str(file)))


def test_a_table_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", f"plan.prices={tmp_path}/none.yaml"]) == 2
    assert "none.yaml cannot be read" in capsys.readouterr().err


def test_the_total_of_each_card_counts_a_shared_stage_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cards are compared, not added up; trials that share a process are packed by predicted memory."""
    file = tmp_path / "plan.json"
    table = "plan.prices={a10: 1000000, currency: EUR}"
    arguments = ["hydra/launcher=packed", "adapter=lora_r4,lora_r8", "plan.device=a10,l40s", table, *CELL]
    assert main(["plan", *arguments, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    content = json.loads(file.read_text(encoding="utf-8"))
    first, second = content["totals"]
    cells = [cell for cell in content["cells"] if cell["device"] == "A10"]
    alone = sum(cell["gpu_hours"] for cell in cells)
    align = cells[0]["stages"][0]["hours"]
    assert (first["device"], first["runs"], first["currency"]) == ("A10", 2, "EUR")
    assert first["alone"] == pytest.approx(alone, abs=2e-4)
    assert first["gpu_hours"] == pytest.approx(alone - align, abs=2e-4)
    assert 0 < first["cost"] < sum(cell["cost"] for cell in cells)
    assert (second["device"], second["runs"], second["currency"], second["cost"]) == ("L40S", 2, "", None)
    assert "total on A10: 2 runs" in printed and "EUR" in printed
    assert printed.count("pack of 2, 2 in a pass") == 2 == len(content["packs"])


def test_a_search_is_at_most_its_trials(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    assert main(["plan", "+sweeps=lora_search", "sweep.n_trials=5", "plan.device=a10", *CELL, "--json", str(file)]) == 0
    content = json.loads(file.read_text(encoding="utf-8"))
    (total,), (cell,) = content["totals"], content["cells"]
    assert (total["runs"], total["is_search"]) == (5, True)
    rest = cell["gpu_hours"] - cell["stages"][0]["hours"]
    assert total["gpu_hours"] == pytest.approx(5 * rest + cell["stages"][0]["hours"], abs=1e-3)
    assert "at most 5 runs" in capsys.readouterr().out
