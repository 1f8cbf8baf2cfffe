"""One recorder, several sinks: the files are essential, the others may fail."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from mgm_exp.errors import DiskFullError, Interrupted
from mgm_exp.record import FilesSink, Recorder, RunInfo, Sink, open_recorder
from mgm_exp.record.recorder import Row


class Listening(Sink):
    """Remembers what it heard."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def start(self, run: RunInfo) -> None:
        self.heard.append("start")

    def row(self, row: Row) -> None:
        self.heard.append(f"row {row['step']}")

    def finish(self, result: Mapping[str, Any]) -> None:
        self.heard.append(f"finish {result['status']}")


class Broken(Listening):
    """Fails at its second row."""

    def row(self, row: Row) -> None:
        super().row(row)
        if row["step"] == 2:
            raise ConnectionResetError("gone")


class BrokenEssential(Broken):
    """A sink that a run cannot do without."""

    essential = True


def info(folder: Path) -> RunInfo:
    return RunInfo("id", folder, "name", None, "run", (), {"seed": 1})


def test_a_sink_that_fails_is_switched_off_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken, listening, files = Broken(), Listening(), FilesSink(tmp_path)
    with caplog.at_level(logging.WARNING), Recorder([files, broken, listening], info(tmp_path)) as recorder:
        recorder.begin()
        recorder.stage_started("align", 4, [])
        for step in (1, 2, 3, 4):
            recorder.row({"stage": "align", "step": step})
        recorder.finish({"status": "completed", "metrics": {}})
    assert broken.heard == ["start", "row 1", "row 2"]
    assert listening.heard == ["start", "row 1", "row 2", "row 3", "row 4", "finish completed"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == ["Broken failed in row"]


def test_an_essential_sink_stops_the_run_after_the_others_were_told(tmp_path: Path) -> None:
    listening = Listening()
    with Recorder([BrokenEssential(), listening], info(tmp_path)) as recorder:
        recorder.begin()
        recorder.row({"step": 1})
        with pytest.raises(ConnectionResetError):
            recorder.row({"step": 2})
    assert "row 2" in listening.heard


def test_an_interruption_inside_a_sink_is_the_runs_not_the_sinks(tmp_path: Path) -> None:
    class Stopped(Sink):
        def row(self, row: Row) -> None:
            raise Interrupted("Stopped by SIGTERM.")

    with Recorder([Stopped()], info(tmp_path)) as recorder, pytest.raises(Interrupted):
        recorder.begin()
        recorder.row({"step": 1})


def test_leaving_without_a_result_closes_the_sinks_all_the_same(tmp_path: Path) -> None:
    listening = Listening()
    with pytest.raises(ZeroDivisionError), Recorder([listening], info(tmp_path)) as recorder:
        recorder.begin()
        _ = 1 / 0
    assert listening.heard == ["start", "finish failed"]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (DiskFullError("No space is left."), {"status": "failed", "message": "No space is left."}),
        (Interrupted("Stopped by SIGTERM."), {"status": "interrupted", "message": None}),
    ],
)
def test_sinks_hear_why_a_run_ended_whose_result_could_not_be_written(
    error: Exception, told: dict[str, Any], tmp_path: Path
) -> None:
    heard: list[Mapping[str, Any]] = []

    class Ending(Sink):
        def finish(self, result: Mapping[str, Any]) -> None:
            heard.append(result)

    with pytest.raises(type(error)), Recorder([Ending()], info(tmp_path)) as recorder:
        recorder.begin()
        raise error
    (result,) = heard
    assert {"status": result["status"], "message": (result.get("error") or {}).get("message")} == told


def test_finish_is_told_once(tmp_path: Path) -> None:
    listening = Listening()
    with Recorder([listening], info(tmp_path)) as recorder:
        recorder.begin()
        recorder.finish({"status": "completed"})
        recorder.finish({"status": "failed"})
    assert listening.heard == ["start", "finish completed"]


def test_the_config_and_what_is_said_stand_on_the_screen_and_in_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Recorder([], info(tmp_path)) as recorder:
        recorder.begin()
        recorder.stage("align")
        recorder.say("align: reused")
    for text in (capsys.readouterr().out, (tmp_path / "log.txt").read_text()):
        assert "seed=1" in text
        assert "== align" in text
        assert "align: reused" in text


def test_before_it_begins_a_run_shows_nothing_and_only_who_asks_for_it_hears_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Alarm(Listening):
        hears_refusals = True

    listening, alarm = Listening(), Alarm()
    with Recorder([FilesSink(tmp_path), listening, alarm], info(tmp_path)) as recorder:
        recorder.note("why it is refused")
        recorder.finish({"status": "failed", "metrics": {}})
    assert capsys.readouterr().out == ""
    assert (tmp_path / "log.txt").read_text().splitlines()[-1] == "why it is refused"
    assert listening.heard == []
    assert alarm.heard == ["start", "finish failed"]
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_run_is_described_for_trackers_without_secrets(tmp_path: Path, compose: Callable[..., Any]) -> None:
    config = compose("adapter=lora_r16")
    config.tracker.base_url = "https://me:canary@host.example"
    overrides = ["adapter=lora_r16", "+x.api_key=canary"]
    run = open_recorder(config, tmp_path / "3", run_id="id", overrides=overrides, sweep="lora").run
    assert (run.group, run.job_type, run.name) == ("lora", "trial", "lora/3")
    assert run.tags == ("adapter=lora_r16", "+x.api_key=***")
    assert run.config["adapter"]["rank"] == 16
    assert "canary" not in json.dumps([run.tags, run.config])
