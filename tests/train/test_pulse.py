"""A process writes down where it is; of processes that stand still, those are named that the others wait for."""

from __future__ import annotations

import json
import time
from pathlib import Path

from mgm_exp.train.pulse import Marks, Pulse, PulseWatch, laggards


def row(passed: int, *, step: int = 4, waits: bool = False, beat: int = 9, where: str = "loop.py:1 f") -> dict:
    return {"beat": beat, "step": step, "passed": passed, "worked": 0, "waits": waits, "where": where}


def named(rows: dict[int, dict], silent: dict[int, float] | None = None, devices: int = 3) -> tuple[int, ...]:
    return laggards(rows, dict.fromkeys(rows, 0.1) | (silent or {}), devices, 30.0, 5.0).ranks


def test_one_that_is_behind_is_named() -> None:
    rows = {0: row(40, waits=True), 1: row(38, where="batches.py:7 load"), 2: row(40, waits=True)}
    found = laggards(rows, dict.fromkeys(rows, 0.1), 3, 30.0, 5.0)
    assert (found.ranks, found.step) == ((1,), 5)
    assert "batches.py:7 load" in found.reason


def test_one_that_gives_no_sign_of_life_is_named_although_it_is_not_behind() -> None:
    assert named({0: row(40), 1: row(40), 2: row(40)}, {2: 31.0}) == (2,)


def test_one_that_never_began_is_named() -> None:
    assert named({0: row(0), 2: row(0)}) == (1,)


def test_of_equals_those_that_do_not_wait_are_named() -> None:
    assert named({0: row(40, waits=True), 1: row(40), 2: row(40, waits=True)}) == (1,)
    assert named({0: row(40), 1: row(40), 2: row(40)}) == (0, 1, 2), "nothing tells them apart"


def test_where_all_are_silent_their_count_decides() -> None:
    assert named({0: row(40), 1: row(37), 2: row(40)}, {0: 31.0, 1: 31.0, 2: 31.0}) == (1,)


def test_a_process_says_where_it_is(tmp_path: Path) -> None:
    marks = Marks()
    pulse = Pulse(tmp_path / "pulse-0.json", marks, 0.02, tmp_path / "abort")
    pulse.start()
    marks.step = 3
    marks.tick()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = json.loads((tmp_path / "pulse-0.json").read_text()) if (tmp_path / "pulse-0.json").exists() else {}
        if found.get("passed") == 1 and "where" in found:
            break
        time.sleep(0.01)
    pulse.end()
    pulse.join(30)
    assert (found["step"], found["waits"]) == (3, False)


def test_a_watch_waits_as_long_as_anything_moves(tmp_path: Path) -> None:
    paths = {rank: tmp_path / f"pulse-{rank}.json" for rank in range(2)}
    watch = PulseWatch(paths, timeout_s=0.4, interval_s=0.02)
    moved = time.monotonic()
    for passed in range(12):  # longer than the timeout, all in all
        for path in paths.values():
            path.write_text(json.dumps(row(passed)))
        assert watch.hang() is None
        time.sleep(0.05)
    paths[0].write_text(json.dumps(row(99, waits=True)))
    found, deadline = None, time.monotonic() + 30
    while found is None and time.monotonic() < deadline:
        found = watch.hang()
        time.sleep(0.01)
    assert found is not None and found.ranks == (1,)
    assert time.monotonic() - moved > 0.4


def test_a_watch_names_those_that_never_begin(tmp_path: Path) -> None:
    path = tmp_path / "pulse-0.json"
    path.write_text(json.dumps(row(0)))
    watch = PulseWatch({0: path, 1: tmp_path / "none"}, timeout_s=0.05, interval_s=0.01, begin_s=0.5)
    begun, found = time.monotonic(), None
    while found is None and time.monotonic() < begun + 30:
        found = watch.hang()
        time.sleep(0.01)
    assert found is not None and found.ranks == (1,) and "has not begun" in found.reason
    assert time.monotonic() - begun >= 0.5


def test_a_watch_that_hears_otherwise_goes_on_waiting(tmp_path: Path) -> None:
    watch = PulseWatch({0: tmp_path / "none"}, timeout_s=1.0, interval_s=0.01, begin_s=1.0)
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        watch.heard()
        assert watch.hang() is None
        time.sleep(0.02)
