"""The real W&B client, offline and in trouble: the run is recorded, and never stopped or slowed by it."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mgm_exp.config import TrackerConfig, TrackerMode
from mgm_exp.record import RunInfo, WandbSink
from mgm_exp.record.wandb_client import evenly, run_id, tags, thumbnail

from .offline_run import OfflineRun

KEY = "c0ffee" * 6 + "c0ff"
RESULT = {"status": "completed", "metrics": {"demo/accuracy": 0.75}, "objective": 0.75, "steps": 5, "error": None}


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key, no settings and no home of the person who runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    monkeypatch.delenv("RANK", raising=False)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def info(run_dir: Path, **more: Any) -> RunInfo:
    values: dict[str, Any] = {
        "run_id": "demo-0-abc",
        "run_dir": run_dir,
        "name": "demo/0",
        "group": "lora",
        "job_type": "trial",
        "tags": ("adapter=lora_r8",),
        "config": {"seed": 3, "adapter": {"rank": 8}},
    }
    return RunInfo(**{**values, **more})


def row(stage: str, step: int, **more: Any) -> dict[str, Any]:
    return {"stage": stage, "step": step, "loss": 1 / step, "lr": 1e-3, "tokens": 100 * step, **more}


def offline(run_dir: Path) -> OfflineRun:
    """The only run that was recorded in the folder."""
    [path] = run_dir.glob("wandb/*run-*/run-*.wandb")
    return OfflineRun(path)


def wait_until(happened: Callable[[], Any], timeout_s: float = 60) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := happened()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
    return found


def children(pid: int) -> Iterator[int]:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            yield int(stat.parent.name)


def core_of(client: int) -> int:
    """The process that W&B's client starts for itself, among others that come and go."""

    def found() -> int | None:
        for pid in children(client):
            try:
                if Path(f"/proc/{pid}/comm").read_text().startswith("wandb-core"):
                    return pid
            except (FileNotFoundError, ProcessLookupError):
                continue
        return None

    return int(wait_until(found))


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.fixture
def predictions(tmp_path: Path) -> tuple[Path, Path]:
    """Ten predictions and the folder of their images; the last image is missing, the one before is damaged."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(9):
        Image.new("RGB", (640, 400), (20 * number, 0, 0)).save(images / f"im{number}.png")
    (images / "im8.png").write_bytes(b"\x89PNG no more")
    path = tmp_path / "demo.jsonl"
    rows = [
        {
            "question_id": number,
            "image_id": f"im{number}",
            "question": "what does the sign say?",
            "question_type": "read",
            "prompt_hash": "x",
            "prediction": f"exit {number}",
            "answers": ["exit"] * 10,
            "score": number / 10,
            "model_fingerprint": "f",
        }
        for number in range(10)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in rows))
    return path, images


def test_a_run_without_a_key_is_recorded_offline_with_everything(
    run_dir: Path, predictions: tuple[Path, Path], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    sink = WandbSink(TrackerConfig(project="mine", table_rows=5))
    sink.start(info(run_dir))
    sink.stage_started("align", 2, [])
    sink.row(row("align", 1))
    sink.row(row("align", 2, loss=float("nan")))
    sink.stage_finished("align", {"steps": 2, "final_loss": 0.5}, False)
    sink.stage_started("instruct", 3, [row("instruct", 1), row("instruct", 2)])
    sink.stage_started("instruct", 3, [row("instruct", 1), row("instruct", 2)])  # a process had to be replaced
    sink.row(row("instruct", 3))
    sink.row({"stage": "instruct", "step": 3, "event": "spike"})
    sink.stage_finished("instruct", {"steps": 3}, True)
    sink.predictions("demo", *predictions, {"demo/accuracy": 0.45})
    sink.finish(RESULT)

    found = offline(run_dir)
    assert (found.run.run_id, found.run.display_name, found.run.project) == ("demo-0-abc", "demo/0", "mine")
    assert (found.run.run_group, found.run.job_type, list(found.run.tags)) == ("lora", "trial", ["adapter=lora_r8"])
    assert found.config["adapter"] == {"rank": 8}
    steps = [line for line in found.history if "align/loss" in line or "instruct/loss" in line]
    assert [line["global_step"] for line in steps] == [1, 2, 3, 4, 5]
    assert [line.get("instruct/step") for line in steps] == [None, None, 1, 2, 3]
    assert found.metrics["align/*"] == "align/step"
    assert found.metrics["instruct/*"] == "instruct/step"
    assert any(line.get("instruct/event/spike") == 1 for line in found.history)
    assert found.summary["demo/accuracy"] == 0.75
    assert found.summary["status"] == "completed"
    assert found.summary["instruct/summary/reused"] is True
    assert found.exit_code == 0
    # The table and its images lie in the run folder, not in a home that may be gone when it is sent.
    [table] = run_dir.glob("wandb/**/media/table/**/*.table.json")
    content = json.loads(table.read_text())
    assert [line[0] for line in content["data"]] == ["0", "2", "4", "6", "8"]
    assert [line[1] is not None for line in content["data"]] == [True, True, True, True, False]
    staged = [path.read_bytes()[:3] for path in (run_dir / "wandb" / "data").rglob("*") if path.is_file()]
    assert staged.count(b"\xff\xd8\xff") == 4
    assert not list((run_dir.parent / "home").rglob("*.wandb"))
    assert not [path for path in run_dir.rglob("*") if path.is_symlink()]
    assert "mgm-exp wandb-sync " in capsys.readouterr().out
    assert warnings_of(caplog) == []


def test_no_secret_reaches_a_file(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canaries = {"WANDB_API_KEY": KEY, "HF_TOKEN": "hf_canaryCANARYcanary99", "OPENAI_API_KEY": "sk-canary-openai-77"}
    for name, value in canaries.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["mgm_exp", f"+x.api_key={KEY}"])
    sink = WandbSink(TrackerConfig(mode=TrackerMode.offline))
    sink.start(info(run_dir))
    sink.stage_started("align", 1, [])
    sink.row(row("align", 1))
    sink.finish(RESULT)
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        content = path.read_bytes()
        for name, value in canaries.items():
            assert value.encode() not in content, f"{name} is in {path}"


def test_a_network_that_is_not_there_leads_to_an_offline_run(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    sink = WandbSink(TrackerConfig(mode=TrackerMode.online, base_url="http://wandb.invalid"))
    began = time.perf_counter()
    sink.start(info(run_dir))
    sink.stage_started("align", 500, [])
    for step in range(1, 501):
        sink.row(row("align", step))
    # Nothing here waited for the client, which needs seconds to begin and ten to find that there is no network.
    assert time.perf_counter() - began < 5
    sink.finish(RESULT)
    [warning] = warnings_of(caplog)
    assert "this run is recorded offline" in warning
    found = offline(run_dir)
    assert [line["align/step"] for line in found.history] == list(range(1, 501))
    assert found.exit_code == 0


def test_a_key_that_nobody_can_use_leads_to_an_offline_run(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "too-short")
    sink = WandbSink(TrackerConfig(mode=TrackerMode.auto))
    sink.start(info(run_dir))
    sink.finish(RESULT)
    [warning] = warnings_of(caplog)
    assert "recorded offline" in warning
    assert offline(run_dir).exit_code == 0


def test_a_killed_wandb_core_switches_the_sink_off_with_one_warning(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sink = WandbSink(TrackerConfig())
    sink.start(info(run_dir))
    sink.stage_started("align", 10**6, [])
    sink.row(row("align", 1))
    client = sink.client_pid
    assert client is not None
    wait_until(lambda: list(run_dir.glob("wandb/offline-run-*/run-*.wandb")))
    core = core_of(client)
    os.kill(core, signal.SIGKILL)
    step = 1
    while sink.is_on:
        step += 1
        assert step < 10**6
        sink.row(row("align", step))
        time.sleep(0.002)
    sink.row(row("align", step + 1))
    began = time.perf_counter()
    sink.finish(RESULT)
    assert time.perf_counter() - began < 1
    [warning] = warnings_of(caplog)
    assert "switched off" in warning
    # The next run of this process starts from nothing.
    (run_dir / "next").mkdir()
    again = WandbSink(TrackerConfig())
    again.start(info(run_dir / "next"))
    again.finish(RESULT)
    assert offline(run_dir / "next").exit_code == 0


def test_a_client_that_does_not_answer_never_blocks_a_row_and_is_given_up_at_the_end(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sink = WandbSink(TrackerConfig(), finish_s=1, backlog=200_000)
    sink.start(info(run_dir))
    client = sink.client_pid
    assert client is not None
    wait_until(lambda: list(run_dir.glob("wandb/offline-run-*/run-*.wandb")))
    core = core_of(client)
    os.kill(client, signal.SIGSTOP)
    sink.stage_started("align", 20_000, [])
    slowest = 0.0
    for step in range(1, 20_001):
        began = time.thread_time()
        sink.row(row("align", step))
        slowest = max(slowest, time.thread_time() - began)
    assert slowest < 0.1
    began = time.perf_counter()
    sink.finish(RESULT)
    assert time.perf_counter() - began < 10
    assert wait_until(lambda: not Path(f"/proc/{client}").exists())
    # Its helper, too: it would go on sending into what wandb-sync sends.
    assert wait_until(lambda: not Path(f"/proc/{core}/exe").exists(), timeout_s=3)
    first, second = warnings_of(caplog)
    assert "no answer within 1 s" in first
    assert "rows are in metrics.jsonl only" in second


def test_the_client_dies_with_its_run(run_dir: Path) -> None:
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from mgm_exp.config import TrackerConfig\n"
        "from mgm_exp.record import RunInfo, WandbSink\n"
        "sink = WandbSink(TrackerConfig())\n"
        "sink.start(RunInfo('id', Path(sys.argv[1]), 'n', None, 'run', ()))\n"
        "print(sink.client_pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", program, str(run_dir)], stdout=subprocess.PIPE)
    assert run.stdout is not None
    try:
        client = int(run.stdout.readline())
        wait_until(lambda: (run_dir / "wandb" / "client.log").exists() and list(run_dir.glob("wandb/offline-run-*")))
        core = core_of(client)
    finally:
        run.kill()
        run.wait()
    run.stdout.close()
    wait_until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in (client, core)), timeout_s=20)


def test_almost_no_space_left_switches_the_sink_off(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("a small file system can be mounted by root only")
    try:
        sink = WandbSink(TrackerConfig())
        sink.start(info(small))
        sink.stage_started("align", 1, [])
        sink.row(row("align", 1))
        sink.finish(RESULT)
        [warning] = warnings_of(caplog)
        assert "bytes are free" in warning
        assert "its files are complete" in warning
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


@pytest.mark.parametrize(
    ("mode", "variables"),
    [("disabled", {}), ("auto", {"RANK": "1"}), ("auto", {"WANDB_MODE": "disabled"})],
)
def test_nothing_is_started_when_it_is_not_wanted(
    mode: str, variables: dict[str, str], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    sink = WandbSink(TrackerConfig(mode=TrackerMode(mode)))
    sink.start(info(run_dir))
    sink.stage_started("align", 1, [])
    sink.row(row("align", 1))
    sink.finish(RESULT)
    assert not sink.is_on
    assert list(run_dir.iterdir()) == []


def test_a_failed_run_is_marked_as_failed(run_dir: Path) -> None:
    sink = WandbSink(TrackerConfig())
    sink.start(info(run_dir))
    error = {"type": "DataError", "message": "no rows", "cause": "the data", "advice": "Give some."}
    sink.finish({**RESULT, "status": "failed", "metrics": {}, "error": error})
    found = offline(run_dir)
    assert found.exit_code == 1
    assert found.summary["error/cause"] == "the data"


def test_ids_and_tags_are_what_the_server_takes() -> None:
    assert run_id("demo-0-abc") == "demo-0-abc"
    odd, other = run_id("a/b:c" * 40), run_id("a/b:c" * 40 + "d")
    assert odd != other
    assert len(odd) <= 64
    assert not set(odd) & set("/\\#?%:")
    assert run_id("a/b") != run_id("a:b")
    assert tags(["a=1", "a=1", "", "x" * 80]) == ("a=1", "x" * 61 + "...")


def test_table_rows_are_spread_over_all_predictions() -> None:
    assert evenly(range(10), 5) == [0, 2, 4, 6, 8]
    assert evenly(range(3), 5) == [0, 1, 2]
    assert evenly(range(10), 0) == []


def test_pictures_are_small_and_never_from_outside_the_folder(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    Image.new("RGB", (1000, 500)).save(tmp_path / "secret.png")
    Image.new("RGB", (1000, 500)).save(root / "a.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    small = thumbnail(root, {"image_id": "a"})
    assert small is not None and small.size == (384, 192)
    assert thumbnail(root, {"image": "../secret.png"}) is None
    assert thumbnail(root, {"image": str(tmp_path / "secret.png")}) is None
    assert thumbnail(root, {"image_id": "link"}) is None
    assert thumbnail(root, {"image_id": ""}) is None
