"""The unmodified W&B client against a server on this machine: what arrives, what a broken server does to a run, and
that ``mgm-exp wandb-sync`` brings the rest afterwards, once."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from mgm_exp.cli import main
from mgm_exp.config import ExperimentConfig, plain
from mgm_exp.record import FilesSink, Recorder, WandbSink, open_recorder
from mgm_exp.record.wandb_upload import Sent, Upload, upload_runs
from tests.fault_table import met

from .loopback_server import LoopbackServer, loopback_server

KEY = "c0ffee" * 6 + "c0ff"
N_ALIGN, N_INSTRUCT = 4, 6
METRICS = {"demo/accuracy": 0.35, "demo/accuracy[read]": 0.35}
RESULT: dict[str, Any] = {
    "status": "completed",
    "metrics": METRICS,
    "eval_keys": {"demo": {"split": "test", "n": 8}},
    "objective": 0.35,
    "steps": N_INSTRUCT,
    "error": None,
}


@pytest.fixture
def server() -> Iterator[LoopbackServer]:
    with loopback_server() as found:
        yield found


@pytest.fixture(autouse=True)
def account(server: LoopbackServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A key for the server, and nothing of the person who runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    for name, value in {"HOME": str(home), "NETRC": str(home / "netrc"), "WANDB_API_KEY": KEY}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.delenv("RANK", raising=False)


@pytest.fixture
def config(compose: Callable[..., ExperimentConfig]) -> ExperimentConfig:
    return compose("adapter=lora_r16", "tracker.table_rows=4", "trial=3", "sweep.name=ranks")


def row(stage: str, step: int) -> dict[str, Any]:
    return {"stage": stage, "step": step, "loss": 1 / step, "lr": 1e-3, "tokens": 100 * step}


def play(folder: Path, config: ExperimentConfig, *, finish_s: float = 45, dies_after: int | None = None) -> None:
    """A run as the experiment records it: two stages, an event, predictions with images, a result.

    Args:
        folder: The run folder.
        config: Its configuration.
        finish_s: What the W&B sink is given at the end.
        dies_after: The run is killed after so many rows of the second stage, and leaves no result.
    """
    images = folder.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    (folder / "predictions").mkdir(parents=True)
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(["adapter=lora_r16", "trial=3"]))
    (folder / "config.yaml").write_text(yaml.safe_dump(plain(config)))
    stages = [{"name": "align", "reused": True}, {"name": "instruct", "reused": False}]
    (folder / "manifest.json").write_text(json.dumps({"run_id": "ranks-3-0a1b2c3d", "stages": stages}))
    opened = open_recorder(config, folder, run_id="ranks-3-0a1b2c3d", overrides=["adapter=lora_r16"], sweep="ranks")
    sink = WandbSink(config.tracker, finish_s=finish_s)
    recorder = Recorder([FilesSink(folder), sink], opened.run)
    recorder.__enter__()
    recorder.begin()
    recorder.stage_started("align", N_ALIGN, [row("align", step) for step in range(1, N_ALIGN + 1)])
    recorder.stage_finished("align", {"steps": N_ALIGN}, True)
    recorder.stage_started("instruct", N_INSTRUCT, [])
    for step in range(1, N_INSTRUCT + 1):
        if dies_after is not None and step > dies_after:
            sink._end_client()
            return
        recorder.row(row("instruct", step))
    recorder.row({"stage": "instruct", "step": N_INSTRUCT, "event": "validation", "value": 0.4})
    recorder.stage_finished("instruct", {"steps": N_INSTRUCT}, False)
    path = folder / "predictions" / "demo.jsonl"
    lines = []
    for number in range(8):
        Image.new("RGB", (64, 40), (20 * number, 0, 0)).save(images / f"im{number}.png")
        asked = {"question_id": number, "image": f"im{number}.png", "image_id": f"im{number}", "question": "what?"}
        answered = {"question_type": "read", "prompt_hash": "p", "prediction": "x", "answers": ["x"]}
        lines.append({**asked, **answered, "score": number / 10})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recorder.predictions("demo", path, images, METRICS)
    (folder / "result.json").write_text(json.dumps(RESULT))
    recorder.finish(RESULT)
    recorder.__exit__(None, None, None)


def sync(folder: Path, **tracker: str) -> Sent:
    roots = {"demo": [str(folder.parent / "images")]}
    [sent] = upload_runs([Upload(str(folder), roots, tracker)])
    return sent


def check_all_arrived(server: LoopbackServer, run_id: str = "ranks-3-0a1b2c3d") -> None:
    """Everything is on the server, in order, and nothing twice."""
    run = server.runs[run_id]
    steps = [line for line in run.history if any(key.endswith("/loss") for key in line)]
    assert [line["global_step"] for line in steps] == list(range(1, N_ALIGN + N_INSTRUCT + 1))
    assert [line.get("instruct/step") for line in steps] == [None] * N_ALIGN + list(range(1, N_INSTRUCT + 1))
    assert sorted(run.steps) == run.steps and len(set(run.steps)) == len(run.steps)
    assert sum(line.get("instruct/event/validation") == 1 for line in run.history) == 1
    assert run.fields["groupName"] == "ranks"
    assert run.fields["jobType"] == "trial"
    assert run.fields["displayName"] == "ranks/3"
    assert run.fields["tags"] == ["adapter=lora_r16"]
    assert run.fields["config"]["adapter"]["value"]["rank"] == 16
    assert run.summary["status"] == "completed"
    assert run.summary["demo/accuracy"] == 0.35
    assert run.summary["align/summary/reused"] is True
    assert run.summary["predictions/demo"]["nrows"] == 4
    assert run.exit_code == 0
    whole = [one for one in server.artifacts if one.state == "COMMITTED" and one.run == run_id]
    assert len(whole) == 1
    [table] = [content for name, content in whole[0].files.items() if name.endswith(".table.json")]
    assert [line[0] for line in json.loads(table)["data"]] == ["0", "2", "4", "6"]
    assert sum(content[:3] == b"\xff\xd8\xff" for content in whole[0].files.values()) == 4
    assert server.unknown == []


def test_a_run_arrives_whole_and_is_not_sent_again(
    server: LoopbackServer, tmp_path: Path, config: ExperimentConfig, caplog: pytest.LogCaptureFixture
) -> None:
    play(tmp_path / "3", config)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    check_all_arrived(server)
    # The key travels in the header that is made for it, and lies in no file.
    assert server.keys == {KEY}
    for path in (tmp_path / "3").rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()
    n_opened = server.runs["ranks-3-0a1b2c3d"].n_opened
    sent = sync(tmp_path / "3")
    assert (sent.sent, sent.lacking, sent.error) == ([], [], "")
    assert server.runs["ranks-3-0a1b2c3d"].n_opened == n_opened


FAULTS = [
    # The key is not accepted: the run goes offline.
    pytest.param("graphql", 401, 0, "recorded offline", id="refused"),
    # The server fails while the run runs: some rows are there.
    pytest.param("file_stream", 500, 1, "switched off", id="fails-midway"),
    # Files do not arrive: the client would call this run complete, without its table.
    pytest.param("put", 403, 0, None, id="loses-files"),
    pytest.param("graphql", "hang", 0, "recorded offline", id="never-answers", marks=pytest.mark.slow),
    pytest.param("graphql", 500, 0, "recorded offline", id="fails", marks=pytest.mark.slow),
    pytest.param("file_stream", "hang", 1, "switched off", id="hangs-midway", marks=pytest.mark.slow),
    pytest.param("put", "hang", 0, "switched off", id="hangs-on-files", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "fault", "answers_before", "warning"), FAULTS)
def test_what_a_broken_server_did_not_take_is_sent_later_and_once(
    kind: str,
    fault: str | int,
    answers_before: int,
    warning: str | None,
    server: LoopbackServer,
    tmp_path: Path,
    config: ExperimentConfig,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server.faults[kind] = fault
    server.answers_before_fault[kind] = answers_before
    began = time.perf_counter()
    # A client that only fails or hangs is given up then; the others are done long before.
    play(tmp_path / "3", config, finish_s=8 if warning == "switched off" else 45)
    assert time.perf_counter() - began < 60
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert [warning in text for text in said] == [True] if warning else said == []
    rows = (tmp_path / "3" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == N_ALIGN + N_INSTRUCT + 1

    server.faults.clear()
    sent = sync(tmp_path / "3")
    assert (sent.error, sent.lacking) == ("", [])
    assert sent.sent
    check_all_arrived(server)
    n_opened = server.runs["ranks-3-0a1b2c3d"].n_opened
    if kind == "file_stream":
        assert sync(tmp_path / "3").sent == []
        assert server.runs["ranks-3-0a1b2c3d"].n_opened == n_opened
    met("tracker", 1)


def test_a_run_that_continues_online_repeats_no_row(
    server: LoopbackServer, tmp_path: Path, config: ExperimentConfig
) -> None:
    """It was killed after its checkpoint: the rows in between are made again, and are in W&B from before."""
    run = open_recorder(config, tmp_path / "3", run_id="id", overrides=[], sweep="ranks").run
    for first, last, kept in ((1, 4, 0), (3, N_INSTRUCT, 2)):
        sink = WandbSink(config.tracker)
        sink.start(run)
        sink.stage_started("align", N_ALIGN, [row("align", step) for step in range(1, N_ALIGN + 1)])
        sink.stage_started("instruct", N_INSTRUCT, [row("instruct", step) for step in range(1, kept + 1)])
        for step in range(first, last + 1):
            sink.row(row("instruct", step))
        sink.finish({**RESULT, "status": "interrupted" if last < N_INSTRUCT else "completed"})
    found = server.runs["id"]
    assert [line["global_step"] for line in found.history] == list(range(1, N_ALIGN + N_INSTRUCT + 1))
    assert sorted(found.steps) == found.steps
    assert (found.summary["status"], found.exit_code) == ("completed", 0)


def test_a_killed_run_is_sent_as_interrupted_and_its_rest_later(
    server: LoopbackServer, tmp_path: Path, config: ExperimentConfig
) -> None:
    config.tracker.mode = type(config.tracker.mode).disabled
    play(tmp_path / "3", config, dies_after=3)
    with (tmp_path / "3" / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "instruct", "st')
    sent = sync(tmp_path / "3", project="mine")
    assert (sent.error, sent.lacking) == ("", [])
    run = server.runs["ranks-3-0a1b2c3d"]
    assert (run.project, run.summary["status"], run.exit_code) == ("mine", "interrupted", 1)
    assert [line["global_step"] for line in run.history] == list(range(1, N_ALIGN + 4))


def test_a_server_that_fails_is_named_and_nothing_else_is_tried(
    server: LoopbackServer, tmp_path: Path, config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.tracker.mode = type(config.tracker.mode).disabled
    for name in ("a", "b"):
        play(tmp_path / name / "3", config)
    (tmp_path / "a" / "3" / "manifest.json").write_text("{")
    monkeypatch.delenv("WANDB_API_KEY")
    uploads = [Upload(str(tmp_path / name / "3"), {}, {}) for name in ("a", "b", "b")]
    damaged, keyless = upload_runs(uploads)
    assert "cannot be read as a run" in damaged.error
    assert not damaged.is_last
    assert "WANDB_API_KEY" in keyless.error
    [masked] = upload_runs([Upload(str(tmp_path / "b" / "3"), {}, {"base_url": "https://***@wandb.example.org"})])
    assert "--base-url" in masked.error
    assert keyless.is_last
    assert server.runs == {}


def sweep_of(folder: Path, config: ExperimentConfig) -> Path:
    """A sweep of two completed trials that were recorded without W&B."""
    config.tracker.mode = type(config.tracker.mode).disabled
    trials = []
    for number, lr in enumerate((0.001, 0.002)):
        config.train.lr = lr
        play(folder / str(number), config)
        manifest = json.loads((folder / str(number) / "manifest.json").read_text())
        (folder / str(number) / "manifest.json").write_text(json.dumps({**manifest, "run_id": f"ranks-{number}-aa"}))
        trials.append({"number": number, "params": {"train.lr": lr}, "status": "completed", "run_dir": str(number)})
    (folder / "sweep.json").write_text(json.dumps({"name": "ranks", "trials": trials}))
    return folder


def test_a_sweep_is_sent_and_its_report_saved_from_the_command_line(
    server: LoopbackServer, tmp_path: Path, config: ExperimentConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = sweep_of(tmp_path / "ranks", config)
    capsys.readouterr()
    assert main(["wandb-sync", str(sweep)]) == 0
    said = capsys.readouterr().out
    assert said.count("sent and found there: 11 of 11 rows, the table of demo, the result") == 2
    assert f"{server.url}/team/mgm_exp/runs/ranks-0-aa" in said

    assert main(["report", str(sweep), "--wandb"]) == 0
    [report] = server.reports.values()
    assert f"{server.url}/team/mgm_exp/reports/" in capsys.readouterr().out
    text = json.dumps(report["spec"])
    for panel in ("Run Comparer", "Parallel Coordinates Plot", "Parameter Importance", "Scatter Plot", "instruct/loss"):
        assert panel in text
    [words] = [block["content"] for block in report["spec"]["blocks"] if block["type"] == "markdown-block"]
    assert words == (sweep / "table.md").read_text()
    assert "statistically tied" in words
    grids = [block for block in report["spec"]["blocks"] if block["type"] == "panel-grid"]
    for grid in grids:
        [runs] = grid["metadata"]["runSets"]
        assert runs["filters"]["filters"][0]["value"] == ["ranks-0-aa", "ranks-1-aa"]
    # The same report is written anew.
    assert main(["report", str(sweep), "--wandb"]) == 0
    assert len(server.reports) == 1
    server.reports.clear()
    assert main(["report", str(sweep), "--wandb"]) == 1
    assert "delete" in capsys.readouterr().err
    assert server.unknown == []
    assert KEY not in "".join(path.read_text() for path in sweep.glob("*.*"))


def test_without_its_package_a_report_says_what_to_install(
    tmp_path: Path, config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert main(["report", str(sweep_of(tmp_path / "ranks", config)), "--wandb"]) == 2
    assert "mgm-exp[wandb]" in capsys.readouterr().err
    assert (tmp_path / "ranks" / "report.html").is_file()
