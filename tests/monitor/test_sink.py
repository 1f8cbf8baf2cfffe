"""A run that is watched: what its folder holds afterwards, and that watching changes nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mgm_exp.config import Device, MonitorConfig
from mgm_exp.monitor import MonitorSink, SystemFile, read_samples
from mgm_exp.record import RunInfo


@pytest.fixture
def sink(compose: Callable[..., Any], tmp_path: Path) -> Any:
    config = compose(f"paths.root={tmp_path / 'out'}", "device=cpu")

    def make(**settings: Any) -> MonitorSink:
        config.monitor = MonitorConfig(**settings)
        assert config.device is Device.cpu
        run_dir = tmp_path / "run"
        run_dir.mkdir(exist_ok=True)
        made = MonitorSink(config, run_dir)
        made.start(RunInfo("demo-1-ab", run_dir, "demo", None, "run", ()))
        return made

    return make


def test_samples_stand_on_the_time_axis_of_the_run(sink: Any, tmp_path: Path) -> None:
    watching = sink(every_s=0.005)
    watching.stage_started("align", 10, [{"stage": "align", "step": 4}])
    seen: dict[str | None, set[Any]] = {}

    def wait_for(stage: str | None, step: int | None) -> None:
        while step not in seen.get(stage, ()):
            for one in read_samples(tmp_path / "run" / "system.jsonl"):
                seen.setdefault(one["stage"], set()).add(one["step"])

    wait_for("align", 4)  # of the checkpoint
    watching.row({"stage": "align", "step": 5, "loss": 1.0})
    wait_for("align", 5)
    watching.stage_finished("align", {}, reused=False)
    wait_for(None, None)
    summary = watching.end()
    watching.finish({"status": "completed"})
    assert summary["samples"] == len(read_samples(tmp_path / "run" / "system.jsonl"))
    assert summary["process_memory_gib_peak"] > 0


def test_a_resumed_run_is_summed_up_with_what_was_before(sink: Any, tmp_path: Path) -> None:
    for expected in (2, 4):
        watching = sink(every_s=1000.0)
        assert watching.end()["samples"] == expected
        watching.finish({"status": "interrupted"})


def test_who_tells_people_hears_of_a_disk_before_its_fullness_ends_the_sampling(
    compose: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(file: SystemFile, sample: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SystemFile, "append", refuse)
    heard: list[Any] = []
    watching = MonitorSink(compose(f"paths.root={tmp_path}", "device=cpu"), tmp_path, [heard.append])
    watching.start(RunInfo("demo-1-ab", tmp_path, "demo", None, "run", ()))
    watching.finish({"status": "failed"})
    assert "root" in heard[0]["disks"]
    assert "No space left" in caplog.text


def test_a_file_that_cannot_be_continued_leaves_no_port_and_no_target_behind(sink: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "system.jsonl").write_text('{"t": 1, "disks": 3}\n')
    with pytest.raises(AttributeError):
        sink(prometheus_port=19_303)
    assert not (tmp_path / "out").exists()


def test_nothing_is_sampled_where_nothing_is_asked_for(sink: Any, tmp_path: Path) -> None:
    watching = sink(every_s=None)
    watching.row({"stage": "align", "step": 1, "loss": math.nan})
    assert watching.end() is None
    watching.finish({"status": "completed"})
    assert list((tmp_path / "run").iterdir()) == []


def test_prometheus_sees_the_samples_and_the_text_file_goes_at_the_end(sink: Any, tmp_path: Path) -> None:
    folder = tmp_path / "textfiles"
    folder.mkdir()
    watching = sink(every_s=0.005, textfile=str(folder), prometheus_port=19_301)
    watching.stage_started("instruct", 10, [])
    watching.row({"stage": "instruct", "step": 3, "loss": 1.5, "grad_norm": 1.0})
    path = folder / "mgm_exp-demo-1-ab.prom"
    while not path.exists() or 'mgm_train_loss{adapter="lora_r8",run="demo-1-ab",stage="instruct"} 1.5' not in (
        text := path.read_text()
    ):
        pass
    assert "mgm_process_memory_bytes" in text
    (target,) = json.loads((tmp_path / "out" / "monitor" / "targets" / "demo-1-ab.json").read_text())
    assert target["labels"]["adapter"] == "lora_r8"
    watching.finish({"status": "completed"})
    assert list(folder.iterdir()) == []
    assert list((tmp_path / "out" / "monitor" / "targets").iterdir()) == []


def test_runs_side_by_side_have_a_port_each_and_the_next_one_has_the_first_again(
    compose: Callable[..., Any], tmp_path: Path
) -> None:
    """As in a pack (side by side in one process), and in a worker that stays (one after another)."""
    config = compose(f"paths.root={tmp_path}", "device=cpu", "monitor.prometheus_port=19302", "monitor.every_s=null")

    def begun(name: str) -> tuple[MonitorSink, str]:
        made = MonitorSink(config, tmp_path)
        made.start(RunInfo(name, tmp_path, name, None, "trial", ()))
        (target,) = json.loads((tmp_path / "monitor" / "targets" / f"{name}.json").read_text())
        return made, target["targets"][0]

    first, address = begun("first")
    second, other = begun("second")
    assert address != other
    first.finish({})
    third, again = begun("third")
    assert again == address
    for one in (second, third):
        one.finish({})
    assert list((tmp_path / "monitor" / "targets").iterdir()) == []
