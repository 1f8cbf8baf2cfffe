"""Rungs: who goes on, when, and what a search with them comes to, whatever happens on the way."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgm_exp.config import BudgetConfig, Direction, PrunerConfig, PrunerName, SweepConfig, ValidationConfig
from mgm_exp.search.rungs import Climber, Ladder, Standing
from tests.fault_table import met
from tests.search import campaign_scenario as scenario
from tests.store.crash_points import run_to_change
from tests.test_stages import base

LADDER = Ladder(first=1, factor=2, synchronous=True, direction=Direction.maximize)


def climber(number: int, value: float, step: int = 1, standing: Standing = Standing.paused) -> Climber:
    return Climber(number, standing, step, dict.fromkeys(range(1, step + 1), value))


# -- who goes on ------------------------------------------------------------------------------------------------------


def test_rungs_begin_at_a_validation_point_and_grow_by_the_factor() -> None:
    pruner = PrunerConfig(PrunerName.rungs, min_step=25, reduction_factor=3)
    train = replace(base().train, validation=ValidationConfig(every_steps=10))
    config = replace(base(), train=train, sweep=SweepConfig(pruner=pruner))
    ladder = Ladder.of(config, Direction.maximize)
    assert ladder is not None and [ladder.step(rung) for rung in range(3)] == [30, 90, 270]
    assert Ladder.of(replace(config, sweep=SweepConfig()), Direction.maximize) is None


def test_a_synchronous_rung_waits_for_all_and_then_lets_its_best_half_go() -> None:
    paused = [climber(number, value) for number, value in enumerate([0.1, 0.4, 0.3, 0.2])]
    assert LADDER.next_up(paused, all_drawn=False) is None
    at_work = Climber(4, Standing.at_work, 1, {})
    assert LADDER.next_up([*paused, at_work], all_drawn=True) is None
    assert LADDER.next_up(paused, all_drawn=True) == (paused[1], 2)
    paused[1] = Climber(1, Standing.at_work, 2, {1: 0.4})
    assert LADDER.next_up(paused, all_drawn=True) == (paused[2], 2)
    paused[2] = Climber(2, Standing.at_work, 2, {1: 0.3})
    assert LADDER.next_up(paused, all_drawn=True) is None, "half of four"


def test_an_asynchronous_one_lets_the_best_go_as_soon_as_they_are_so_many() -> None:
    ladder = replace(LADDER, synchronous=False)
    paused = [climber(0, 0.5), climber(1, 0.7)]
    assert ladder.next_up(paused[:1], all_drawn=False) is None
    assert ladder.next_up(paused, all_drawn=False) == (paused[1], 2)
    high = [climber(2, 0.8, 2), climber(3, 0.1, 2), *paused]
    assert ladder.next_up(high, all_drawn=False) == (high[0], 4), "the highest rung first"


def test_of_equals_the_lower_number_goes_and_no_number_is_the_worst() -> None:
    paused = [climber(2, 0.5), climber(1, 0.5), climber(0, math.nan), climber(3, 0.1)]
    assert LADDER.next_up(paused, all_drawn=True) == (paused[1], 2)
    small = replace(LADDER, direction=Direction.minimize)
    assert small.next_up(paused, all_drawn=True) == (paused[3], 2)


def test_there_is_a_winner_though_the_shares_are_below_one_and_whoever_was_to_win_fails() -> None:
    three = replace(LADDER, factor=3)
    assert three.next_up([climber(0, 0.1), climber(1, 0.2)], all_drawn=True) == (climber(1, 0.2), 3)
    failed = Climber(1, Standing.ended, 3, {1: 0.2})
    assert three.next_up([climber(0, 0.1), failed], all_drawn=True) == (climber(0, 0.1), 3)
    done = Climber(1, Standing.completed, 3, {1: 0.2})
    assert three.next_up([climber(0, 0.1), done], all_drawn=True) is None


def test_a_trial_that_ended_early_keeps_its_place_with_its_last_score() -> None:
    early = Climber(0, Standing.completed, 2, {1: 0.9})
    paused = [climber(number, 0.1 * number, 2) for number in (1, 2, 3)]
    assert early.at(8) == 0.9 and climber(1, 0.1).at(2) is None
    assert LADDER.next_up([early, *paused], all_drawn=True) == (paused[2], 4)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=14),
    st.integers(2, 4),
    st.integers(1, 5),
    st.randoms(use_true_random=False),
)
def test_a_synchronous_search_ends_alike_for_any_number_of_slots_and_any_timing(
    scores: list[int], factor: int, slots: int, chance: random.Random
) -> None:
    """A model of the campaign: trials finish in random order. Scores of a trial differ from rung to rung."""
    length = 20

    def play(slots: int, chance: random.Random) -> tuple[dict[int, int], list[int]]:
        ladder = replace(LADDER, factor=factor)
        trials: dict[int, Climber] = {}
        while True:
            busy = [c for c in trials.values() if c.standing is Standing.at_work]
            if len(busy) < slots:
                all_drawn = len(trials) == len(scores)
                up = ladder.next_up(list(trials.values()), all_drawn=all_drawn)
                if up is not None:
                    trials[up[0].number] = replace(up[0], standing=Standing.at_work, until=up[1])
                    continue
                if not all_drawn:
                    trials[len(trials)] = Climber(len(trials), Standing.at_work, 1, {})
                    continue
            if not busy:
                break
            done = chance.choice(busy)
            reached = range(1, min(done.until, length - 1) + 1)
            points = {step: float((scores[done.number] * (step + 3)) % 7) for step in reached}
            standing = Standing.completed if done.until >= length else Standing.paused
            trials[done.number] = replace(done, points=points, standing=standing)
        ends = {number: max(c.points) for number, c in trials.items()}
        return ends, [number for number, c in trials.items() if c.standing is Standing.completed]

    alone = play(1, random.Random(0))
    assert play(slots, chance) == alone
    assert alone[1], "somebody wins"
    rungs = [factor**k for k in range(5) if factor**k < length]
    at_rung = [sum(end >= step for end in alone[0].values()) for step in rungs]
    assert all(later == max(1, now // factor) for now, later in pairwise(at_rung))


# -- a search with them -----------------------------------------------------------------------------------------------

RANKS = [20, 3, 41, 8, 33, 12, 60, 5]
LENGTH = 8
POINTS = [{"adapter.rank": rank, "seed": 0} for rank in RANKS]


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills lose nothing that was written, whether the disk has it or not; waiting for the disk is most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def search(folder: Path, n_trials: int = len(RANKS), **other: Any) -> dict[str, Any]:
    settings = {"pruner": PrunerName.rungs, "enqueue": POINTS[:n_trials], "points": LENGTH, **other}
    return scenario.search(folder, n_trials, **settings)


def steps(folder: Path) -> list[int]:
    """How many steps each trial ran."""
    numbers = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    return [len((folder / str(number) / "steps.txt").read_text().split()) for number in numbers]


SYNCHRONOUS = [2, 1, 4, 1, 2, 1, 8, 1]
"""Steps of each trial: the best four of eight (20, 41, 33, 60) leave step 1, two of them step 2, one step 4."""


def test_trials_climb_and_the_best_of_all_wins_with_a_third_of_the_steps(tmp_path: Path) -> None:
    said: list[str] = []
    found = search(tmp_path / "s", say=said.append)
    assert steps(tmp_path / "s") == SYNCHRONOUS, "each step once"
    assert [trial["status"] for trial in found["trials"]] == [*["pruned"] * 6, "completed", "pruned"]
    assert found["best"]["number"] == 6 and found["status"] == "completed"
    assert found["rungs"] == {"reached": [[1, 8], [2, 4], [4, 2]], "steps": 20, "full_steps": 64}
    assert "rungs: 8 trial(s) to step 1, 4 trial(s) to step 2, 2 trial(s) to step 4, 1 to the end; 20 steps" in said[-1]
    assert found["trials"][2]["error"]["message"] == "not among the best at step 4"
    assert json.loads((tmp_path / "s" / "2" / "result.json").read_text())["status"] == "pruned"
    assert search(tmp_path / "s")["trials"] == found["trials"], "the same command repeats nothing"
    record = tmp_path / "s" / "2" / "result.json"
    as_it_was = json.loads(record.read_text())
    record.write_text(json.dumps({**as_it_was, "status": "paused", "error": None}))
    search(tmp_path / "s")
    assert json.loads(record.read_text()) == as_it_was, "killed before it noted this, a sweep does so the next time"


@pytest.mark.parametrize("slots", [3, 8])
def test_the_number_of_slots_changes_nothing_of_a_synchronous_search(tmp_path: Path, slots: int) -> None:
    found = search(tmp_path / "s", slots=slots)
    assert steps(tmp_path / "s") == SYNCHRONOUS and found["best"]["number"] == 6


def test_an_asynchronous_search_promotes_on_the_way(tmp_path: Path) -> None:
    said: list[str] = []
    found = search(tmp_path / "s", synchronous=False, say=said.append)
    begun = [line.split(":")[0].strip() for line in said if line.startswith("\ntrial")]
    assert begun[:3] == ["trial 0", "trial 1", "trial 0"], "one of two goes on at once"
    assert found["best"]["number"] == 6
    assert sum(steps(tmp_path / "s")) < 0.5 * LENGTH * len(RANKS)


def test_only_a_trial_that_comes_to_its_end_runs_its_other_seeds(tmp_path: Path) -> None:
    search(tmp_path / "s", seeds=2)
    folder = tmp_path / "s"
    assert (folder / "6" / "seed_1" / "steps.txt").read_text().split() == [str(step) for step in range(1, 9)]
    assert not list(folder.glob("[0-57]/seed_1"))


def test_a_trial_that_fails_on_its_way_leaves_the_search_a_winner(tmp_path: Path) -> None:
    found = search(tmp_path / "s", failing=[60])
    assert [trial["status"] for trial in found["trials"]].count("failed") == 1
    assert found["best"]["number"] == 2, "the next best goes to the end"


def test_a_search_whose_hours_are_over_keeps_its_paused_trials(tmp_path: Path) -> None:
    found = search(tmp_path / "s", n_trials=3, budget=BudgetConfig(hours=0.3 / 3600), step_s=0.2)
    states = [trial["status"] for trial in found["trials"]]
    assert "paused" in states and "completed" not in states and "hours" in found["stopped_because"]
    found = search(tmp_path / "s", n_trials=3)
    assert [trial["status"] for trial in found["trials"]] == ["pruned", "pruned", "completed"]
    assert steps(tmp_path / "s") == [1, 1, 8]


def test_a_longer_search_takes_trials_back_that_a_shorter_one_had_dropped(tmp_path: Path) -> None:
    """Of four two are promoted; of eight also 41's point, dropped at step 1 before, under a new number."""
    order = [{"adapter.rank": rank, "seed": 0} for rank in (41, 50, 60, 3)]
    found = scenario.search(tmp_path / "s", 4, pruner=PrunerName.rungs, enqueue=order, points=LENGTH)
    assert found["best"]["number"] == 2 and found["trials"][0]["status"] == "pruned"
    more = [*order, *({"adapter.rank": rank, "seed": 0} for rank in (1, 2, 4, 5))]
    found = scenario.search(tmp_path / "s", 8, pruner=PrunerName.rungs, enqueue=more, points=LENGTH)
    assert found["trials"][8]["params"]["adapter.rank"] == 41, "among the best half of eight"
    assert 0 not in found["grid"] and 8 in found["grid"] and found["best"]["number"] == 2


# -- killed -----------------------------------------------------------------------------------------------------------

TO_THE_END = 10**9
FEW = 2


def small(folder: Path, kill_at: int = TO_THE_END) -> Any:
    """A search of two in a forked process that dies at its n-th change: None then, else what came of it."""

    def run(say: Any) -> None:
        found = search(folder, n_trials=FEW, points=2)
        say(json.dumps(scenario.summary(found)))

    point = run_to_change(run, kill_at)
    return json.loads(point.said[-1]) if point.is_last else None


@pytest.mark.parametrize("every", [70, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_each_change_a_search_with_rungs_ends_as_if_undisturbed(tmp_path: Path, every: int) -> None:
    undisturbed, folder = small(tmp_path / "u"), tmp_path / "s"
    assert [status for _, status, _, _ in undisturbed] == ["completed", "pruned"]
    ran, kill_at, points = steps(tmp_path / "u"), 1 + random.Random(0).randrange(every), 0
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        killed = small(folder, kill_at) is None
        assert small(folder) == undisturbed, kill_at
        assert all(0 <= now - then <= 1 for now, then in zip(steps(folder), ran, strict=True)), (kill_at, "repeated")
        assert not list((folder / ".claims").glob("*")), kill_at
        if not killed:
            break
        kill_at, points = kill_at + every, points + 1
    met("kill: sweep", points)
