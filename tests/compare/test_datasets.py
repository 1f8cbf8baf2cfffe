from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from run_folders import config, write_run

from mgm_exp.compare import compare, markdown, print_comparison, write_comparison
from mgm_exp.data.exploration import text_statistics


def stage(captions: list[str], **more: Any) -> dict[str, Any]:
    counts = {"file": "pairs.jsonl", "rows": 12, "kept": len(captions), "dropped": {}, "rejected": {"missing": 2}}
    return {**counts, "changed": {}, "text": text_statistics(captions), **more}


def run_with_data(folder: Path, name: str, captions: list[str], fingerprint: str, **more: Any) -> Path:
    path = write_run(folder, [1.0, 0.0, 1.0, 1.0], settings=config(data={"name": name}))
    content = {"name": name, "fingerprint": fingerprint, "align": stage(captions, **more), "instruct": stage(["yes"])}
    captioner = {"captioner": "demo-blip2 (synthetic)"} if name == "blip2" else None
    (path / "data.json").write_text(json.dumps({**content, "recaption": captioner}))
    return path


@pytest.fixture
def arms(tmp_path: Path) -> list[Path]:
    raw = [f"red sign {word}" for word in "abcdefghij"] * 40  # 1,200 words
    new = [f"a red round sign that reads {word} number {n}" for n, word in enumerate("abcdefghij")] * 40
    return [
        run_with_data(tmp_path / "r0", "raw", raw, "f0"),
        run_with_data(tmp_path / "r1", "raw", raw, "f0"),
        run_with_data(tmp_path / "b0", "blip2", new, "f1", changed={"recaptioned": 400}, dropped={"words_num": 3}),
    ]


def test_each_kind_of_data_is_listed_once_with_its_runs(arms: list[Path]) -> None:
    raw, blip2 = compare(arms)["data"]
    assert (raw["name"], raw["captioner"], raw["runs"]) == ("raw", None, [str(arms[0]), str(arms[1])])
    assert (blip2["name"], blip2["captioner"], blip2["runs"]) == ("blip2", "demo-blip2 (synthetic)", [str(arms[2])])
    assert (raw["align"]["rows"], raw["align"]["kept"], raw["align"]["rejected"]) == (12, 400, 2)
    assert (blip2["align"]["dropped"], blip2["align"]["recaptioned"]) == ({"words_num": 3}, 400)
    assert raw["align"]["words_mean"] == 3 and raw["align"]["too_short_share"] == 1
    assert blip2["align"]["words_mean"] == 9 and blip2["align"]["too_short_share"] == 0


def test_diversity_is_compared_at_a_size_that_all_data_have(arms: list[Path], tmp_path: Path) -> None:
    found = compare(arms)["data"]
    assert {entry["align"]["ttr"]["size"] for entry in found} == {1000}
    small = run_with_data(tmp_path / "small", "other", ["one two"], "f2")
    assert [entry["align"]["ttr"] for entry in compare([*arms, small])["data"]] == [None, None, None]


def test_the_table_shows_data_where_it_differs(arms: list[Path]) -> None:
    both, one = compare(arms), compare(arms[:2])
    console = Console(record=True, width=160)
    print_comparison(both, console)
    shown = console.export_text()
    assert "captions of the align stage" in shown and "blip2 (captions by demo-blip2 (synthetic))" in shown
    assert "at 1,000" in markdown(both)
    assert "align stage" not in markdown(one).replace("aligned", "")


def test_on_a_narrow_terminal_data_stand_side_by_side_and_nothing_is_broken(arms: list[Path]) -> None:
    console = Console(record=True, width=90)
    print_comparison(compare(arms), console)
    lines = console.export_text().splitlines()
    [ttr] = [line for line in lines if line.startswith("TTR ")]
    assert ttr.count(" at 1,000") == 2 and ttr.count("[") == ttr.count("]")


def test_runs_without_a_record_of_their_data_are_compared_all_the_same(tmp_path: Path, arms: list[Path]) -> None:
    plain = write_run(tmp_path / "plain", [1.0, 1.0, 1.0, 1.0])
    damaged = write_run(tmp_path / "damaged", [1.0, 1.0, 1.0, 0.0])
    (damaged / "data.json").write_text("{")
    assert len(compare([*arms, plain, damaged])["data"]) == 2
    path = write_comparison(compare(arms), tmp_path)
    assert json.loads(path.read_text())["data"][0]["runs"] == ["r0", "r1"]
