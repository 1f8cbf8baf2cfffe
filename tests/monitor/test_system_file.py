"""``system.jsonl``: it is bounded, survives a kill, and is summed up."""

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from mgm_exp.config import MonitorLimitsConfig
from mgm_exp.monitor import Summary, SystemFile, read_samples
from mgm_exp.monitor.machine import Machine
from mgm_exp.monitor.sampler import Sampler


def test_samples_are_there_as_soon_as_they_are_taken(tmp_path: Path) -> None:
    file = SystemFile(tmp_path / "system.jsonl")
    file.append({"t": 1.0, "gpus": []})
    assert read_samples(file.path) == [{"t": 1.0, "gpus": []}]
    file.close()


def test_a_resumed_run_continues_the_file_without_the_line_that_a_kill_left(tmp_path: Path) -> None:
    path = tmp_path / "system.jsonl"
    path.write_text('{"t":1}\n{"t":2}\n{"t":3,"cp')
    file = SystemFile(path)
    file.append({"t": 4})
    file.close()
    assert path.read_text() == '{"t":1}\n{"t":2}\n{"t":4}\n'


def test_the_file_stays_bounded_and_covers_the_whole_run(tmp_path: Path) -> None:
    file = SystemFile(tmp_path / "system.jsonl", most_lines=16)
    for t in range(1000):
        file.append({"t": t})
        assert len(file.path.read_text().splitlines()) <= 16
    file.close()
    times = [sample["t"] for sample in read_samples(file.path)]
    assert times == sorted(times)
    assert len(times) >= 8
    assert times[0] == 0 and times[-1] > 850
    gaps = {later - earlier for earlier, later in itertools.pairwise(times)}
    assert max(gaps) <= 2 * 64


def test_thinning_keeps_the_pause_between_two_attempts(tmp_path: Path) -> None:
    path = tmp_path / "system.jsonl"
    for begin in (0, 1001):  # an odd and an even line
        file = SystemFile(path, most_lines=16)
        file.append({"t": begin, "stage": None})
        for t in range(begin + 1, begin + 41):
            file.append({"t": t, "stage": "instruct"})
        file.close()  # killed in its stage
    stages = [(sample["t"], sample["stage"]) for sample in read_samples(path)]
    assert {(0, None), (1001, None)} <= set(stages) and len(stages) <= 16


def test_a_full_disk_is_said_once_and_closing_is_well(tmp_path: Path) -> None:
    file = SystemFile(tmp_path / "system.jsonl")
    file.path = Path("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        file.append({"t": 1})
    file.close()


def test_foreign_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "system.jsonl"
    path.write_text('{"t":1}\nnot json\n[]\n{"no":"time"}\n{"t":2}\n')
    assert [sample["t"] for sample in read_samples(path)] == [1, 2]
    assert read_samples(tmp_path / "nothing.jsonl") == []


def sample(t: float, *, stage: str | None = "instruct", use: float | None = 0.5, used: float = 10.0) -> dict[str, Any]:
    gpu = {"index": 0, "memory_used_gib": used, "memory_total_gib": 80.0, "utilization": use, "power_w": None}
    disks = {"root": {"free_gib": 100 - t, "total_gib": 200}}
    return {"t": t, "stage": stage, "cpu": 0.25, "memory_gib": t, "process_memory_gib": 2.0, "disks": disks,
            "gpus": [gpu]}  # fmt: skip


def test_a_summary_has_peaks_and_the_share_in_which_gpus_waited() -> None:
    limits = MonitorLimitsConfig(idle_share=0.1)
    found = Summary(limits, [sample(1), sample(2, used=70.0), sample(3, use=0.05), sample(4, stage=None, use=0.0)])
    assert found.as_json() == {
        "samples": 4,
        "cpu_mean": 0.25,
        "gpu_utilization_mean": 0.35,
        "gpu_idle_share": 0.3333,
        "memory_gib_peak": 4,
        "process_memory_gib_peak": 2.0,
        "gpu_memory_gib_peak": 70.0,
        "disk_free_gib_least": {"root": 96},
    }


def test_a_summary_of_nothing_says_so() -> None:
    assert Summary(MonitorLimitsConfig()).as_json() == {"samples": 0}


# -- the thread ------------------------------------------------------------------------------------------------------


def test_the_sampler_samples_at_once_and_at_the_end_and_says_where_the_run_is() -> None:
    taken: list[dict[str, Any]] = []
    first = threading.Event()
    sampler = Sampler(Machine({}), 1000.0, lambda: {"stage": "align", "step": 3}, [taken.append, lambda s: first.set()])
    sampler.start()
    assert first.wait(10)
    sampler.stop()
    sampler.stop()
    assert [list(one)[:3] for one in taken] == [["t", "stage", "step"]] * 2
    assert (taken[0]["stage"], taken[0]["step"]) == ("align", 3)
    assert json.dumps(taken)


def test_a_listener_that_fails_ends_the_sampling_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    def fail(sample: dict[str, Any]) -> None:
        raise OSError(28, "No space left on device")

    sampler = Sampler(Machine({}), 0.001, dict, [fail])
    sampler.start()
    sampler._thread.join(10)
    sampler.stop()
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text and "the run goes on" in caplog.text
