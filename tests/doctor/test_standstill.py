"""A process that stood still is told from a slow one by the gap in the samples of its machine."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mgm_exp.doctor import case_of_run, diagnose
from mgm_exp.doctor.curves import Row
from mgm_exp.doctor.standstill import standstill_facts
from mgm_exp.store import Lease
from tests.doctor.runs import falling, rows, write_run


def sampled(times: Sequence[Any], stage: Any = "instruct") -> list[Row]:
    return [Row(line, {"t": t, "stage": stage}) for line, t in enumerate(times, 1)]


def stood(found: list[Row]) -> float:
    return float(standstill_facts(found)["instruct"][0].value)


def test_the_longest_gap_is_measured_against_the_rhythm_around_it_and_named_by_its_line() -> None:
    still, share = standstill_facts(sampled([0, 10, 20, 30, 75, 85, 95]))["instruct"]
    assert (still.name, still.value, still.place) == ("system.stood_still_s", 35, "system.jsonl:5")
    assert "for 45 s" in still.in_words and "every 10 s" in still.in_words
    assert (share.name, share.value) == ("system.stood_still_share", pytest.approx(35 / 95))


@pytest.mark.parametrize("every_s", [0.5, 10, 600])
def test_the_rhythm_is_the_one_that_was_set(every_s: float) -> None:
    steady = [place * every_s for place in range(6)]
    assert stood(sampled(steady)) == pytest.approx(0)
    assert stood(sampled([*steady, steady[-1] + every_s + 30])) == pytest.approx(30)


def test_a_pause_between_two_attempts_or_stages_is_no_gap() -> None:
    again = [*sampled([0, 10, 20, 30]), *sampled([4000], None), *sampled([4010, 4020, 4030])]
    assert stood(again) == 0
    other = [*sampled([0, 10, 20, 30], "align"), *sampled([900, 910, 920, 930])]
    assert {stage: facts[0].value for stage, facts in standstill_facts(other).items()} == {"align": 0, "instruct": 0}


def test_a_stage_of_two_samples_is_measured_by_the_rhythm_of_the_run() -> None:
    short = [*sampled([0, 10, 20], None), *sampled([30, 61]), *sampled([67], None)]
    assert stood(short) == 21
    assert standstill_facts(short[2:]) != {} and standstill_facts(short[3:]) == {}


def test_a_clock_that_was_set_back_is_no_gap() -> None:
    still, share = standstill_facts(sampled([1000, 1010, 1020, 500, 510, 520]))["instruct"]
    assert (still.value, share.value) == (0, 0)


def test_samples_that_tell_nothing_are_passed_over() -> None:
    assert standstill_facts(sampled([0, 10, 90])) == {}
    assert standstill_facts(sampled([0, 10, 20, 90], None)) == {}
    assert stood(sampled([0, None, "x", True, 10**400, float("nan"), 10, 20, 30])) == 0
    assert standstill_facts(sampled([0, 10, 20, 90], {"a": "list"})) == {}


def run_sampled_until(folder: Path, ago_s: float) -> Path:
    """A run without an end that was sampled every 10 s until so many seconds ago, and wrote nothing since."""
    last = time.time() - ago_s
    system = [{"t": last - 10 * left, "stage": "instruct"} for left in range(20, -1, -1)]
    write_run(folder, rows(60, falling), system=system, result={}, manifest={"started_at": "now", "ended_at": None})
    os.utime(folder / "metrics.jsonl", (last, last))
    return folder


def test_a_process_that_stands_still_now_is_named(tmp_path: Path) -> None:
    run = run_sampled_until(tmp_path, 300)
    with Lease(run / ".lease"):
        first, *others = diagnose(case_of_run(run)).findings
    assert first.entry.id == "process-stood-still" and not others
    assert "up to now" in first.evidence[0].quote and first.evidence[0].place == "system.jsonl:21"


def test_a_run_that_goes_on_or_is_gone_does_not_stand_still(tmp_path: Path) -> None:
    def named(run: Path) -> list[str]:
        return [finding.entry.id for finding in diagnose(case_of_run(run)).findings]

    with Lease((run := run_sampled_until(tmp_path / "sampled just now", 12)) / ".lease"):
        assert named(run) == []
    with Lease((run := run_sampled_until(tmp_path / "only its sampler ended", 300)) / ".lease"):
        os.utime(run / "metrics.jsonl")
        assert named(run) == []
    with Lease((run := run_sampled_until(tmp_path / "gone", 300)) / ".lease"):
        pass
    assert named(run) == ["killed-without-a-word"]
