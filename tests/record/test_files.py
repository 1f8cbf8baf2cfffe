"""``metrics.jsonl``: flushed lines, cut back on resume, strict JSON."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mgm_exp.errors import DiskFullError
from mgm_exp.record import FilesSink, json_line


def row(stage: str, step: int, **more: Any) -> dict[str, Any]:
    return {"stage": stage, "step": step, "loss": 1.0 / step, **more}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_row_is_on_disk_before_the_call_returns(tmp_path: Path) -> None:
    sink = FilesSink(tmp_path)
    sink.stage_started("align", 3, [])
    for step in (1, 2, 3):
        sink.row(row("align", step))
        assert lines(tmp_path)[-1]["step"] == step


def test_a_batch_in_trouble_is_named_once_whatever_is_computed_again(tmp_path: Path) -> None:
    bad = row("instruct", 7, event="spike", reason="spike", action="warn", batch=6, sample_ids=["a", "b"])
    back = {"event": "rollback", "stage": "instruct", "step": 4, "from_step": 9, "reason": "spike", "batch": 8}
    sink = FilesSink(tmp_path)
    sink.stage_started("instruct", 9, [])
    for one in (row("instruct", 6), bad, back | {"action": "rollback", "sample_ids": ["c"]}):
        sink.row(one)
    again = FilesSink(tmp_path)
    again.stage_started("instruct", 9, [bad])
    again.row(back | {"action": "rollback", "sample_ids": ["c"]})
    again.row(row("instruct", 8, event="nothing_to_learn", sample_ids=["d"]))
    found = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [(one["step"], one["batch"], one["sample_ids"]) for one in found] == [(7, 6, ["a", "b"]), (9, 8, ["c"])]
    assert found[0]["reason"] == "spike"


def test_a_killed_process_loses_no_row(tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from mgm_exp.record import FilesSink\n"
        "sink = FilesSink(Path(sys.argv[1]))\n"
        "sink.stage_started('align', 9, [])\n"
        "for step in range(1, 8): sink.row({'stage': 'align', 'step': step})\n"
        "print('written', flush=True)\n"
        "time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"written\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, 8))


def test_resume_cuts_the_stage_back_to_its_checkpoint_and_keeps_the_others(tmp_path: Path) -> None:
    first = FilesSink(tmp_path)
    first.stage_started("align", 2, [])
    first.row(row("align", 1))
    first.row(row("align", 2))
    first.stage_started("instruct", 9, [])
    for step in (1, 2, 3, 4, 5):
        first.row(row("instruct", step))
    first.row({"stage": "instruct", "step": 5, "event": "spike"})

    again = FilesSink(tmp_path)
    again.stage_started("instruct", 9, [row("instruct", 1), row("instruct", 2)])
    again.row(row("instruct", 3, loss=0.5))
    assert [(line["stage"], line["step"]) for line in lines(tmp_path)] == [
        ("align", 1),
        ("align", 2),
        ("instruct", 1),
        ("instruct", 2),
        ("instruct", 3),
    ]
    assert lines(tmp_path)[-1]["loss"] == 0.5


def test_a_line_that_a_kill_left_half_written_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json_line(row("align", 1)) + '\n{"stage": "align", "st')
    sink = FilesSink(tmp_path)
    sink.stage_started("instruct", 1, [])
    sink.row(row("instruct", 1))
    assert [line["stage"] for line in lines(tmp_path)] == ["align", "instruct"]


def test_cutting_back_never_touches_a_file_that_shares_its_bytes(tmp_path: Path) -> None:
    stored = tmp_path / "stored.jsonl"
    stored.write_text(json_line(row("align", 1)) + "\n")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    os.link(stored, run_dir / "metrics.jsonl")
    sink = FilesSink(run_dir)
    sink.stage_started("instruct", 1, [])
    sink.row(row("instruct", 1))
    assert len(stored.read_text().splitlines()) == 1


def test_a_run_without_training_has_the_file_too(tmp_path: Path) -> None:
    from mgm_exp.record import RunInfo

    sink = FilesSink(tmp_path)
    sink.start(RunInfo("id", tmp_path, "name", None, "run", ()))
    sink.finish({})
    assert lines(tmp_path) == []


@pytest.mark.parametrize(("value", "word"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_numbers_that_json_does_not_know_keep_their_name(value: float, word: str) -> None:
    read = json.loads(json_line(row("align", 1, loss=value)), parse_constant=lambda name: pytest.fail(name))
    assert read["loss"] is None
    assert read["non_finite"] == {"loss": word}
    assert float(read["non_finite"]["loss"]) == value or math.isnan(value)


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # /dev/full fails every write with ENOSPC: the real error of the real kernel.
    sink = FilesSink(Path("/dev"))
    monkeypatch.setattr(sink, "path", Path("/dev/full"))
    with pytest.raises(DiskFullError, match="No space is left"):
        sink.row(row("align", 1))
