"""A trial in a worker that did others before it gives the bits of the same trial in a process of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mgm_exp.slots import ChildProcesses, Slots, Work, in_sweep, own_program
from mgm_exp.warm.slots import WarmSlots

from .conftest import collect

SMALL = (
    "debug=fast", "device=cpu", "train.precision=fp32", "data.demo_images=24", "data.demo_questions=1",
    "train.max_steps=2", "train.align.max_steps=1", "eval.max_questions=2", "train.freeze_connector=false",
    "train.cache_visual_tokens=false",
)  # fmt: skip
TRIAL = ("adapter.rank=3", "adapter.dropout=0.1", "seed=1")
BEFORE = {
    0: ("adapter=full", "eval.demo.baselines=false"),
    1: ("adapter.rank=4", "adapter.init=pissa", "seed=2", "train.optimize_vision_tower=true"),
    2: ("adapter.rank=4", "data.image_root=/nowhere", "data.path=/nowhere"),
}
NUMBER = 9


def run(slots: Slots, root: Path, number: int, overrides: tuple[str, ...]) -> int | None:
    given = (*SMALL, *overrides, f"paths.root={root}", *in_sweep(number, "s", str(number)))
    slots.start(Work(number, root / "sweeps" / "s" / str(number), given))
    return collect(slots, 1)[number].exit_code


def result(root: Path) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Losses and norms of every step, and the bytes of what was trained and answered."""
    folder = root / "sweeps" / "s" / str(NUMBER)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [*folder.glob("adapter/*.safetensors"), folder / "predictions" / "demo.jsonl"]
    assert len(kept) == 3
    return (
        [{key: row[key] for key in ("stage", "step", "loss", "grad_norm") if key in row} for row in rows],
        {path.name: path.read_bytes() for path in kept},
    )


def test_a_trial_after_others_has_the_bits_of_one_in_a_new_process(tmp_path: Path) -> None:
    new, warm = tmp_path / "new", tmp_path / "warm"
    assert run(ChildProcesses([[]], own_program()), new, NUMBER, TRIAL) == 0
    shutil.copytree(new / "store", warm / "store", symlinks=True)
    for stage in ("align", "instruct", "evaluate"):
        shutil.rmtree(warm / "store" / stage)
    slots = WarmSlots([[]], own_program(), max_growth_gb=1.0)
    try:
        codes = [run(slots, warm, number, overrides) for number, overrides in BEFORE.items()]
        (pid,) = slots.pids
        assert codes == [0, 0, 2]
        assert run(slots, warm, NUMBER, TRIAL) == 0
        assert slots.pids == [pid]
    finally:
        slots.close()
    manifest = json.loads((warm / "sweeps" / "s" / str(NUMBER) / "manifest.json").read_text(encoding="utf-8"))
    made = {stage["name"]: not stage["reused"] for stage in manifest["stages"]}
    assert made["align"] and made["instruct"] and made["evaluate[demo] the trained model"]
    assert result(warm) == result(new)
    assert len(result(new)[0]) >= 3
