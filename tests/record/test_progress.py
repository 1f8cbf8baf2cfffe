"""Stage, loss, speed and time left, on a terminal and elsewhere."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from mgm_exp.record import ProgressSink, log_to
from mgm_exp.record.log import plain_line
from mgm_exp.record.progress import Pace


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"stage": "align", "step": step, "loss": 2.5, "tokens_per_s": 1234.5, **more}


class Terminal(io.StringIO):
    """A terminal that remembers what it was sent."""

    def isatty(self) -> bool:
        return True


def test_without_a_terminal_there_is_a_line_at_the_start_and_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    sink = ProgressSink(line_every_s=3600)
    sink.stage_started("align", 50, [])
    for step in range(1, 51):
        sink.row(row(step))
    sink.stage_finished("align", {}, False)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["align", "1/50"], ["align", "50/50"]]
    assert "loss 2.5000" in lines[1]
    assert "1,234 tokens/s" in lines[1]
    assert "/s  took 0:00:0" in lines[1]


def test_lines_come_as_often_as_asked(capsys: pytest.CaptureFixture[str]) -> None:
    sink = ProgressSink(line_every_s=0)
    sink.stage_started("align", 3, [])
    for step in (1, 2, 3):
        sink.row(row(step))
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_resumed_stage_says_where_it_continues(capsys: pytest.CaptureFixture[str]) -> None:
    sink = ProgressSink()
    sink.stage_started("align", 50, [row(1), row(20), {"stage": "align", "step": 20, "event": "checkpoint"}])
    assert capsys.readouterr().out == "align: continues at step 20 of 50\n"


def test_a_reused_stage_shows_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    sink = ProgressSink()
    sink.stage_started("align", 2, [row(1), row(2)])
    sink.stage_finished("align", {}, True)
    assert capsys.readouterr().out == ""


def test_events_and_losses_that_are_not_numbers_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    sink = ProgressSink()
    sink.stage_started("align", 9, [])
    sink.row(row(1, loss=None))
    sink.row({"stage": "align", "step": 1, "event": "skipped", "why": "overflow"})
    first, second = capsys.readouterr().out.splitlines()
    assert "loss ?" in first
    assert second == "align step 1: skipped why=overflow"


def test_other_work_has_its_progress_too(capsys: pytest.CaptureFixture[str]) -> None:
    sink = ProgressSink(line_every_s=3600)
    for done in (10, 20, 30):
        sink.progress("evaluate[demo]", done, 30)
    sink.progress("images", 5, 5)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["evaluate[demo]", "10/30"],
        ["evaluate[demo]", "30/30"],
        ["images", "5/5"],
    ]


def test_on_a_terminal_lines_stand_above_the_bar_and_the_log_has_no_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with redirect_stdout(screen), log_to(tmp_path):
        sink = ProgressSink(line_every_s=3600)
        sink.stage_started("align", 3, [])
        sink.row(row(1))
        print("something happened")
        sink.row(row(2))
        sink.row(row(3))
        sink.stage_finished("align", {}, False)
        print("after the bar")
    seen = screen.getvalue()
    assert "━" in seen
    assert "something happened" in seen
    assert seen.endswith("after the bar\n")
    log = (tmp_path / "log.txt").read_text().splitlines()[1:]
    assert [line.split("  ")[:2] for line in log] == [
        ["align", "1/3"],
        ["something happened"],
        ["align", "3/3"],
        ["after the bar"],
    ]
    assert all(line == plain_line(line) and "━" not in line for line in log)


def test_pace_counts_only_what_was_done_since_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 2.0, 4.0, 6.0, 200.0])
    monkeypatch.setattr("mgm_exp.record.progress.time.monotonic", lambda: next(times))
    pace = Pace(100, 200)
    for done in (101, 102, 103):
        pace.reach(done)
    assert pace.unit_s == pytest.approx(2.0)
    assert pace.in_words("steps") == "2.0 s each  0:03:14 left"
    pace.reach(200)
    assert pace.in_words("").endswith("took 0:03:20")


def test_work_that_was_done_before_the_first_call_is_not_taken_for_speed(capsys: pytest.CaptureFixture[str]) -> None:
    ProgressSink().progress("evaluate[demo]", 900, 1000)
    assert capsys.readouterr().out == "evaluate[demo]  900/1000\n"
