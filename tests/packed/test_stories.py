"""Runs told together in one process are ordinary runs, each in its own folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mgm_exp.folders import read_record
from mgm_exp.packed.process import Ordered, run_orders

COMMON = [
    *("device=cpu", "tracker.mode=disabled", "data.demo_images=8", "data.demo_questions=16", "eval.max_questions=2"),
    *("eval.demo.baselines=false", "train.align.max_steps=0", "train.max_steps=2", "train.global_batch_size=2"),
    *("train.micro_batch_size=2", "launch.pack=true"),
]
RUNS = {
    0: ["adapter=lora_r8", "train.lr=1e-3"],
    1: ["adapter=lora_r16", "adapter.dropout=0.2", "seed=1"],
    2: ["adapter=lora_r8", "train.lr=1e-3", "eval.max_questions=1"],  # trains what 0 trains
    3: ["adapter=bitfit"],
    4: ["adapter=lora_r8", "train.lr=-1"],  # is refused
    5: ["adapter=lora_r8", "train.lr=1e-4", "data.path=/nowhere.jsonl"],  # fails before it trains
}


class Told:
    """The runs above, told in one process."""

    def __init__(self, root: Path) -> None:
        self.root, self.codes, self.said = root, dict[int, int](), list[str]()
        orders = [
            Ordered(number, self.folder(number), (*COMMON, f"paths.root={root}", *own, *self._place(number)))
            for number, own in RUNS.items()
        ]
        self.exit_code = run_orders(orders, self._note, self.said.append, None)

    def _note(self, number: int, code: int) -> None:
        assert number not in self.codes
        self.codes[number] = code

    def folder(self, number: int) -> Path:
        return self.root / "sweeps" / "s" / str(number)

    def _place(self, number: int) -> list[str]:
        return [f"trial={number}", "sweep.name=s", f"hydra.run.dir='{self.folder(number)}'"]

    def record(self, number: int, name: str = "result.json") -> dict[str, Any]:
        return read_record(self.folder(number) / name)

    def instruct(self, number: int) -> dict[str, Any]:
        return next(stage for stage in self.record(number, "manifest.json")["stages"] if stage["name"] == "instruct")


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    return Told(tmp_path_factory.mktemp("told"))


def test_every_run_ends_as_it_would_alone(told: Told) -> None:
    assert told.exit_code == 0
    assert told.codes == {0: 0, 1: 0, 2: 0, 3: 0, 4: 2, 5: 2}
    assert [told.record(number).get("status") for number in RUNS] == [*["completed"] * 4, None, "failed"]
    assert told.said[:2] == [
        "pack: 3 trains alone: adapter.kind=bitfit, only LoRA is packed",
        "pack: 2 trial(s) train together",
    ]
    assert "train.lr" in (told.folder(4) / "output.txt").read_text()


def test_what_is_trained_together_has_a_key_that_says_so(told: Told) -> None:
    for number, is_packed in ((0, True), (1, True), (3, False)):
        entry = told.root / "store" / "instruct" / told.instruct(number)["key"]
        assert json.loads((entry / "stage.json").read_text())["inputs"]["engine"].get("pack", False) is is_packed
        engine = json.loads((entry / "summary.json").read_text())["engine"]["name"]
        assert engine == ("pack" if is_packed else "pytorch")


def test_a_run_that_asks_for_the_same_adapter_takes_it_when_the_pack_is_done(told: Told) -> None:
    assert told.instruct(2)["key"] == told.instruct(0)["key"]
    assert [told.instruct(number)["reused"] for number in (0, 1, 2)] == [False, False, True]


def test_each_log_holds_its_own_run(told: Told) -> None:
    for number in (0, 1):
        log = (told.folder(number) / "log.txt").read_text()
        assert f"run folder: {told.folder(number)}" in log
        assert str(told.folder(1 - number)) not in log
        assert log.count("trainable set verified") == 1
        rows = (told.folder(number) / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows] == [1, 2]
