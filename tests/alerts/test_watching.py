"""Which messages go out: once when a rule begins to hold, again after a while, with those held back counted."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from mgm_exp.alerts import Message, Rate, of_sweep
from mgm_exp.alerts.watching import Watched, Watcher
from mgm_exp.config import MonitorLimitsConfig
from mgm_exp.store import write_json_atomic


class Collected:
    """Takes messages in place of servers."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def send(self, message: Message) -> None:
        self.messages.append(message)

    @property
    def kinds(self) -> list[str]:
        return [message.kind for message in self.messages]


def watcher(folder: Path, *, minutes: float = 30, on_finish: bool = False, sweep: Path | None = None) -> Watcher:
    watched = Watched(
        name="run",
        folder=str(folder),
        urls=[],
        every_minutes=minutes,
        on_finish=on_finish,
        limits=asdict(MonitorLimitsConfig(stalled_s=100.0)),
        rate_folder=str(sweep or folder),
        in_sweep=sweep is not None,
        parent=1,
    )
    return Watcher(watched, Collected())  # type: ignore[arg-type]


def sent(of: Watcher) -> Collected:
    assert isinstance(of.channels, Collected)
    return of.channels


def row(step: int, **values: Any) -> dict[str, Any]:
    return {"call": "row", "row": {"stage": "instruct", "step": step, "loss": 1.0, "grad_norm": 1.0, **values}}


NAN = {"loss": None, "event": "not_finite"}
FAILED = {
    "status": "failed",
    "error": {
        "type": "LossNotFinite",
        "message": "step 3",
        "cause": "c",
        "advice": "a",
        "doctor": {"id": "nan-rate-too-high", "title": "The rate is too high", "fix": ["Give train.lr=1e-4"]},
    },
}


def test_a_rule_that_begins_to_hold_is_told_once_and_again_after_a_while(tmp_path: Path) -> None:
    run = watcher(tmp_path, minutes=1)
    run.hear({"call": "stage_started"}, 1000.0)
    run.hear(row(1, **NAN), 1001.0)
    for now in (1002.0, 1010.0, 1050.0):
        run.look(now)
    assert sent(run).kinds == ["TrainLossNaN"]
    assert "mgm-exp doctor --entry loss-not-finite" in sent(run).messages[0].body
    run.look(1063.0)  # it still holds
    assert sent(run).kinds == ["TrainLossNaN"] * 2


def test_a_run_that_gives_no_sign_is_told_of_by_the_process_beside_it(tmp_path: Path) -> None:
    run = watcher(tmp_path)
    run.hear({"call": "stage_started"}, 1000.0)
    run.hear(row(1), 1001.0)
    run.look(1050.0)
    assert sent(run).kinds == []
    run.look(1102.0)
    assert sent(run).kinds == ["StalledStep"]
    run.hear({"call": "stage_finished"}, 1103.0)
    run.look(1400.0)
    assert sent(run).kinds == ["StalledStep"]


def test_samples_of_the_machine_raise_alerts_too(tmp_path: Path) -> None:
    run = watcher(tmp_path)
    disks = {"root": {"free_gib": 0.5, "total_gib": 100.0}}
    gpus = [{"index": 0, "memory_used_gib": 79.0, "memory_total_gib": 80.0, "utilization": 0.9}]
    for now in (1000.0, 1030.0, 1070.0):
        run.hear({"call": "sample", "sample": {"t": now, "disks": disks, "gpus": gpus}}, now)
        run.look(now)
    assert sent(run).kinds == ["DiskFilling", "DeviceMemoryHigh"]


def test_a_failed_run_sends_the_likeliest_cause_and_an_interrupted_one_nothing(tmp_path: Path) -> None:
    run = watcher(tmp_path)
    assert run.hear({"call": "finish", "result": FAILED}, 1000.0)
    (message,) = sent(run).messages
    assert message.kind == "RunFailed" and message.severity == "critical"
    assert "nan-rate-too-high" in message.body and "train.lr=1e-4" in message.body
    for status in ("interrupted", "paused", "pruned"):
        other = watcher(tmp_path / status, on_finish=True)
        other.hear({"call": "finish", "result": {"status": status}}, 1000.0)
        assert sent(other).messages == []


def test_a_good_end_is_told_where_it_is_asked_for_and_a_trials_by_its_sweep(tmp_path: Path) -> None:
    result = {"status": "completed", "metrics": {"demo/accuracy": 0.5}, "wall_s": 90.0, "steps": 12}
    for on_finish, sweep, kinds in ((False, None, []), (True, tmp_path, []), (True, None, ["RunFinished"])):
        run = watcher(tmp_path, on_finish=on_finish, sweep=sweep)
        run.hear({"call": "finish", "result": result}, 1000.0)
        assert sent(run).kinds == kinds
    assert "demo/accuracy 0.5000" in sent(run).messages[0].body


def test_a_hundred_trials_that_fail_send_one_message_and_the_sweep_counts_the_others(tmp_path: Path) -> None:
    trials = [watcher(tmp_path / str(number), sweep=tmp_path) for number in range(100)]
    for number, trial in enumerate(trials):
        trial.hear({"call": "finish", "result": FAILED}, 1000.0 + number)
    assert [kind for trial in trials for kind in sent(trial).kinds] == ["RunFailed"]
    held_back = Rate(tmp_path, 1800.0).held_back()
    assert held_back == 99
    content = {"name": "s", "objective": "demo/accuracy", "best": None, "trials": [{"status": "failed"}] * 100}
    message = of_sweep(content, str(tmp_path), ["A is better than B by 3.0 points"], "report.html", held_back)
    assert "99 message(s)" in message.body and "100 failed" in message.body and "report.html" in message.body
    later = watcher(tmp_path / "later", sweep=tmp_path)
    later.hear({"call": "finish", "result": FAILED}, 1000.0 + 1801)
    assert "(99 more of this kind" in sent(later).messages[0].body


def test_the_rate_is_kept_over_a_resume_and_by_kind(tmp_path: Path) -> None:
    assert Rate(tmp_path, 60.0).take("A", 1000.0) == 0
    assert Rate(tmp_path, 60.0).take("A", 1059.0) is None
    assert Rate(tmp_path, 60.0).take("B", 1059.0) == 0
    assert Rate(tmp_path, 60.0).take("A", 1061.0) == 1
    (tmp_path / "alerts.json").write_text("not json")
    assert Rate(tmp_path, 60.0).take("A", 1062.0) == 0


def test_where_the_rate_cannot_be_kept_messages_are_sent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = watcher(tmp_path / "gone")
    run.hear({"call": "finish", "result": FAILED}, 1000.0)
    assert sent(run).kinds == ["RunFailed"]
    assert "the rate of messages cannot be kept" in caplog.text


def test_a_run_whose_last_word_was_lost_is_not_called_dead(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    result.write_text(json.dumps({"status": "completed"}))  # of an earlier attempt
    resumed = watcher(tmp_path, on_finish=True)
    write_json_atomic(result, FAILED)
    resumed.died(1001.0)
    assert sent(resumed).kinds == ["RunFailed"]
    again = watcher(tmp_path)
    again.died(1002.0)
    assert sent(again).kinds == ["TrainerDown"]


def test_a_run_that_is_gone_is_told_with_its_last_step(tmp_path: Path) -> None:
    run = watcher(tmp_path)
    run.hear({"call": "stage_started"}, 1000.0)
    run.hear(row(7), 1001.0)
    run.died(1002.0)
    (message,) = sent(run).messages
    assert message.kind == "TrainerDown" and "instruct step 7" in message.body


@pytest.mark.parametrize("secret", ["hf_abcdefghijklmnopqrstuv"])
def test_a_message_holds_no_secret(tmp_path: Path, secret: str) -> None:
    run = watcher(tmp_path)
    run.hear({"call": "finish", "result": {"status": "failed", "error": {"type": "E", "message": secret}}}, 1.0)
    assert secret not in sent(run).messages[0].body
