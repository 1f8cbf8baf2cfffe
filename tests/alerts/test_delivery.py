"""Messages arrive, and whatever a server does, a run neither waits for it nor fails."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("apprise")

from mgm_exp.alerts import AlertSink, Channels, Message, deliver, tell_sweep
from mgm_exp.cli import main
from mgm_exp.config import AlertsConfig, MonitorLimitsConfig
from mgm_exp.record import RunInfo

from .webhook import Webhook, webhook

MESSAGE = Message("Kind", "warning", "title", "body")
KEY = "canary-" + "0123456789abcdef"


@pytest.fixture
def hook() -> Iterator[Webhook]:
    with webhook() as found:
        yield found


def run_in(folder: Path) -> RunInfo:
    return RunInfo("id", folder, "run", None, "run", (), {})


def sink(url: str, **settings: float) -> AlertSink:
    return AlertSink(AlertsConfig([url], 30.0, True), MonitorLimitsConfig(), **settings)


def test_a_message_arrives_with_the_key_put_in(hook: Webhook) -> None:
    assert deliver(f"json://127.0.0.1:{hook.port}/$HOOK_PATH", MESSAGE, {"HOOK_PATH": KEY}) is None
    (heard,) = hook.heard
    assert (heard["title"], heard["message"], heard["type"]) == ("title", "body", "warning")
    assert KEY in heard["path"]


def test_a_server_that_refuses_is_named_without_the_key(hook: Webhook) -> None:
    hook.status = 500
    why = deliver(f"json://127.0.0.1:{hook.port}/$HOOK_PATH", MESSAGE, {"HOOK_PATH": KEY})
    assert why is not None and "500" in why and KEY not in why
    assert "$NOT_SET" in (deliver("slack://$NOT_SET/$B", MESSAGE, {}) or "")


def test_a_server_that_never_answers_holds_up_neither_the_sender_nor_another_server(hook: Webhook) -> None:
    hook.status, said = 0, list[str]()
    with webhook() as other:
        channels = Channels([hook.url, other.url, "json://127.0.0.1:9"], said.append)
        began = time.monotonic()
        for _ in range(40):
            channels.send(MESSAGE)
        assert time.monotonic() - began < 1.0
        other.wait(32)
        assert len(other.heard) >= 32  # what waits is bounded
        assert not channels.close(0.2)
    assert any("is too slow" in sentence and "alerts.urls[0]" in sentence for sentence in said)


def test_a_run_hands_its_alerts_and_its_end_to_a_process_beside_it(hook: Webhook, tmp_path: Path) -> None:
    watched = sink(hook.url, finish_s=30.0, poll_s=0.1)
    watched.start(run_in(tmp_path))
    watched.stage_started("instruct", 10, [])
    watched.row({"stage": "instruct", "step": 1, "loss": None, "grad_norm": None, "event": "not_finite"})
    hook.wait(1)
    watched.sample({"t": time.time(), "disks": {"root": {"free_gib": 0.1, "total_gib": 100.0}}, "gpus": []})
    hook.wait(2)
    watched.finish({"status": "completed", "metrics": {"demo/accuracy": 0.25}, "wall_s": 60.0, "steps": 1})
    assert [title.split(": ")[0] for title in hook.titles] == [
        "mgm_exp TrainLossNaN",
        "mgm_exp DiskFilling",
        "mgm_exp finished",
    ]
    assert (tmp_path / "alerts.log").read_text() == ""


def test_a_run_that_is_killed_is_told_of(hook: Webhook, tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from mgm_exp.alerts import AlertSink; "
        "from mgm_exp.config import AlertsConfig, MonitorLimitsConfig; from mgm_exp.record import RunInfo; "
        "sink = AlertSink(AlertsConfig([sys.argv[1]]), MonitorLimitsConfig()); "
        "sink.start(RunInfo('id', Path(sys.argv[2]), 'run', None, 'run', (), {})); "
        "sink.stage_started('instruct', 9, []); "
        "sink.row({'stage': 'instruct', 'step': 4, 'loss': 1.0, 'lr': 1e-4}); print('ready', flush=True); "
        "time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, hook.url, str(tmp_path)], stdout=subprocess.PIPE, start_new_session=True
    ) as run:
        assert run.stdout is not None and run.stdout.readline() == b"ready\n"
        os.killpg(run.pid, signal.SIGKILL)
    (message,) = hook.wait(1)
    assert "TrainerDown" in message["title"] and "instruct step 4" in message["message"]


@pytest.mark.parametrize("fault", ["dead", "silent", "refusing"])
def test_whatever_the_server_does_the_run_ends_within_seconds(fault: str, hook: Webhook, tmp_path: Path) -> None:
    hook.status = {"dead": 200, "silent": 0, "refusing": 500}[fault]
    watched = sink("json://127.0.0.1:9" if fault == "dead" else hook.url, finish_s=0.5)
    watched.start(run_in(tmp_path))
    began = time.monotonic()
    for step in range(2000):
        watched.row({"stage": "instruct", "step": step, "loss": 1.0})
    watched.finish({"status": "completed", "metrics": {}})
    assert time.monotonic() - began < 10
    assert KEY not in (tmp_path / "alerts.log").read_text()


def test_a_watcher_that_dies_costs_the_run_nothing(hook: Webhook, tmp_path: Path) -> None:
    watched = sink(hook.url, finish_s=0.5)
    watched.start(run_in(tmp_path))
    assert watched._watcher is not None
    watched._watcher.kill()
    watched._watcher.wait()
    for step in range(5):
        watched.row({"stage": "instruct", "step": step, "loss": 1.0})
    watched.finish({"status": "completed", "metrics": {}})


def test_a_sweep_sends_its_verdict(hook: Webhook, tmp_path: Path) -> None:
    content = {
        "name": "ranks",
        "status": "completed",
        "objective": "demo/accuracy",
        "trials": [{"status": "completed"}, {"status": "failed"}],
        "best": {"number": 0, "value": 0.75},
    }
    (tmp_path / "report.html").write_text("<html>")
    tell_sweep(AlertsConfig([hook.url], 30.0, False), tmp_path, content)
    assert hook.heard == []  # not asked for
    tell_sweep(AlertsConfig([hook.url], 30.0, True), tmp_path, content, wait_s=30.0)
    (message,) = hook.heard
    assert "best: trial 0, demo/accuracy 0.7500" in message["message"]
    assert str(tmp_path / "report.html") in message["message"] and "1 failed" in message["message"]
    assert not message["attachments"]
    tell_sweep(AlertsConfig([hook.url], 30.0, True, attach_report=True), tmp_path, content, wait_s=30.0)
    (file,) = hook.heard[-1]["attachments"]
    assert (file["filename"], base64.b64decode(file["base64"])) == ("report.html", b"<html>")


def test_a_sweep_ends_as_it_did_where_nobody_can_be_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "apprise", None)  # as where it is not installed
    tell_sweep(AlertsConfig(["json://127.0.0.1:9"], 30.0, True), tmp_path, {"name": "ranks", "status": "completed"})
    assert "how the sweep ended is not told" in caplog.text


def test_a_test_message_says_who_took_it(hook: Webhook, capsys: pytest.CaptureFixture[str]) -> None:
    addresses = json.dumps([hook.url, "json://127.0.0.1:9"]).replace('"', "'")
    assert main(["alert", "--test", f"alerts.urls={addresses}"]) == 1
    told = capsys.readouterr().out.splitlines()
    assert told[0].endswith(": taken") and "not taken: " in told[1]
    assert main(["alert", "--test", f"alerts.urls=['{hook.url}']"]) == 0
    assert main(["alert", "--test"]) == 2
