"""When a search is over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from optuna import load_study

from mgm_exp.config import BudgetConfig, Direction, PlateauConfig, PrunerName, SweepConfig
from mgm_exp.search.budget import Budget, Clock, since_better
from mgm_exp.search.reports import study_name
from mgm_exp.search.study import open_storage, storage_place
from tests.search.campaign_scenario import calls, search

UP, DOWN = Direction.maximize, Direction.minimize


def test_time_counts_over_all_calls_also_those_that_were_killed(tmp_path: Path) -> None:
    first = Clock(tmp_path)
    first.tick(4, save=True)
    (file,) = (tmp_path / ".sweepers").glob("clock-*.json")
    file.write_text(json.dumps({"seconds": 1800, "gpu_seconds": 7200}))
    (tmp_path / ".sweepers" / "clock-torn.json").write_text("{")
    second = Clock(tmp_path)
    assert second.hours == pytest.approx(0.5, abs=1e-3) and second.gpu_hours == pytest.approx(2.0, abs=1e-3)
    budget = Budget.of(SweepConfig(budget=BudgetConfig(hours=0.4)))
    assert "hours=0.4" in budget.is_spent(second, [], UP)
    assert "gpu_hours=1" in Budget.of(SweepConfig(budget=BudgetConfig(gpu_hours=1))).is_spent(second, [], UP)
    assert Budget.of(SweepConfig(budget=BudgetConfig(hours=0.6))).is_spent(second, [], UP) == ""


def test_the_smaller_number_of_trials_counts() -> None:
    assert Budget.of(SweepConfig(n_trials=5)).trials == 5
    assert Budget.of(SweepConfig(n_trials=5, budget=BudgetConfig(trials=3))).trials == 3
    assert Budget.of(SweepConfig(n_trials=5, budget=BudgetConfig(trials=9))).trials == 5


@pytest.mark.parametrize(
    ("values", "direction", "min_delta", "count"),
    [
        ([], UP, 0.0, 0),
        ([0.5], UP, 0.0, 0),
        ([0.5, 0.6, 0.7], UP, 0.0, 0),
        ([0.5, 0.6, 0.7], DOWN, 0.0, 2),
        ([0.5, 0.7, 0.6, 0.7], UP, 0.0, 2),
        ([0.5, 0.55, 0.59], UP, 0.1, 2),
        ([3.0, 2.0, 2.5], DOWN, 0.0, 1),
    ],
)
def test_a_plateau_is_counted_from_the_last_better_value(
    values: list[float], direction: Direction, min_delta: float, count: int
) -> None:
    assert since_better(values, direction, min_delta) == count


def test_a_plateau_ends_a_search(tmp_path: Path) -> None:
    budget = Budget.of(SweepConfig(plateau=PlateauConfig(trials=2)))
    clock = Clock(tmp_path)
    assert budget.is_spent(clock, [0.5, 0.4], UP) == ""
    assert "nothing better" in budget.is_spent(clock, [0.5, 0.4, 0.3], UP)


def test_a_search_that_starts_nothing_new_still_ends_what_another_sweeper_left_behind(tmp_path: Path) -> None:
    """Else it would wait for ever for a trial that nobody works on."""
    folder = tmp_path / "s"

    def say(text: str) -> None:
        if "no further trial is started" in text:  # another sweeper asks for a trial at this moment, and is killed
            load_study(study_name=study_name(folder), storage=open_storage(storage_place(None, folder))).ask()

    content = search(folder, 9, pruner=PrunerName.none, plateau=1, say=say)
    assert len(content["trials"]) < 9 and "nothing better" in content["stopped_because"]
    assert [trial["status"] for trial in content["trials"]] == ["completed"] * len(content["trials"])
    assert calls(folder, content["trials"][-1]["number"]) == 1
