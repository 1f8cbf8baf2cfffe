"""Every sampler and pruner by its name; draws that depend on seed, trial and history alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from mgm_exp.compose import parse
from mgm_exp.config import Direction, PrunerConfig, PrunerName, SamplerConfig, SamplerName
from mgm_exp.errors import ConfigError, MissingDependencyError
from mgm_exp.search.pruners import make_pruner
from mgm_exp.search.samplers import VIOLATIONS, make_sampler
from mgm_exp.search.space import Space, parse_space
from mgm_exp.search.study import open_storage, open_study, trial_of

SPACE = ("x=interval(0,1)", "y=tag(log,interval(1e-3,1))", "n=range(0,10)", "c=a,b,c")
NEEDS = {SamplerName.gp: "scipy", SamplerName.qmc: "scipy", SamplerName.cmaes: "cmaes"}


def space(*arguments: str, **params: Any) -> Space:
    return parse_space(list(arguments or SPACE), params, parse)


def value(params: dict[str, Any]) -> float:
    return float((params["x"] - 0.3) ** 2 + params["y"] + params["n"] / 10 + "abc".index(params["c"]) / 3)


def study_in(folder: Path, config: SamplerConfig, found: Space, directions: int = 1, **more: Any) -> optuna.Study:
    return open_study(
        open_storage(str(folder / "study.journal")),
        "study",
        [Direction.minimize] * directions,
        make_sampler(config, found, **more),
        make_pruner(PrunerConfig(PrunerName.none)),
    )


def next_point(study: optuna.Study, found: Space) -> tuple[int, dict[str, Any]]:
    trial = study.ask()
    return trial.number, found.choose(trial, lambda name, overrides: None).params


def needs(name: SamplerName) -> None:
    if importlib.util.find_spec(NEEDS.get(name, "optuna")) is None:
        pytest.skip(f"{name.value} needs {NEEDS[name]}, which is not installed")


@pytest.mark.parametrize("name", list(SamplerName))
def test_every_sampler_searches_and_a_restart_in_the_middle_changes_nothing(tmp_path: Path, name: SamplerName) -> None:
    needs(name)
    found = (
        space("x=range(0,1,0.25)", "y=range(0.1,1,0.3)", "n=range(0,3)", "c=a,b") if name.value == "grid" else space()
    )
    config = SamplerConfig(name, seed=5, startup=4)

    def search(folder: Path, restarts: tuple[int, ...]) -> list[dict[str, Any]]:
        folder.mkdir()
        study, points = study_in(folder, config, found), []
        for _ in range(9):
            if len(points) in restarts:
                study = study_in(folder, config, found)
            number, params = next_point(study, found)
            if number in restarts:  # killed after the draw, before it was told: taken up again
                study = study_in(folder, config, found)
                again = found.choose(trial_of(study, number), lambda name, overrides: None).params
                assert again == params
            study.tell(number, value(params))
            points.append(params)
        return points

    undisturbed = search(tmp_path / "a", ())
    assert search(tmp_path / "b", (2, 5, 7)) == undisturbed
    assert len({tuple(point.values()) for point in undisturbed}) == 9, "no draw is repeated"


def test_a_draw_that_was_cut_off_ends_as_it_would_have(tmp_path: Path) -> None:
    """Killed between two parameters: what is there stays, the others are the same as without the kill."""
    config, found = SamplerConfig(SamplerName.tpe, seed=1, startup=3), space()
    for cut in range(4):
        study = study_in(tmp_path / str(cut), config, found)
        for _ in range(5):
            number, params = next_point(study, found)
            study.tell(number, value(params))
        trial = study.ask()
        for item in found.dimensions[:cut]:
            item.domain.suggest(trial, item.name)
        again = study_in(tmp_path / str(cut), config, found)
        params = found.choose(trial_of(again, trial.number), lambda name, overrides: None).params
        if cut == 0:
            whole = params
        assert params == whole


def test_two_sweepers_with_one_seed_propose_different_points(tmp_path: Path) -> None:
    config, found = SamplerConfig(SamplerName.random, seed=0), space()
    first, second = (study_in(tmp_path, config, found) for _ in range(2))
    points = [next_point(study, found) for study in (first, second, second, first)]
    assert [number for number, _ in points] == [0, 1, 2, 3]
    assert len({point["x"] for _, point in points}) == 4


def test_the_grid_takes_every_point_once_with_its_upper_bounds(tmp_path: Path) -> None:
    found = space("n=range(8,17,8)", "x=range(0,0.11,0.05)")
    study = study_in(tmp_path, SamplerConfig(SamplerName.grid), found)
    points = set()
    for _ in range(6):
        number, params = next_point(study, found)
        points.add((params["n"], round(params["x"], 6)))
        study.tell(number, 1.0)
    assert points == {(n, x) for n in (8, 16) for x in (0.0, 0.05, 0.1)}
    with pytest.raises(ConfigError, match="no end"):
        make_sampler(SamplerConfig(SamplerName.grid), space())


def test_a_sampler_learns_to_avoid_what_is_infeasible(tmp_path: Path) -> None:
    config, found = SamplerConfig(SamplerName.tpe, startup=6), space("x=interval(0,1)")
    study = study_in(tmp_path, config, found, with_constraints=True)
    drawn = []
    for _ in range(30):
        trial = study.ask()
        x = found.choose(trial, lambda name, overrides: None).params["x"]
        trial.set_user_attr(VIOLATIONS, [x - 0.3])
        if x > 0.3:
            study.tell(trial, state=TrialState.PRUNED)  # as a trial that ran out of memory
        else:
            study.tell(trial, -x)
        drawn.append(x)
    assert sum(x <= 0.35 for x in drawn[10:]) >= 12, "a random search would draw about 7 of 20"


def test_several_objectives(tmp_path: Path) -> None:
    found = space("x=interval(0,1)")
    study = study_in(tmp_path, SamplerConfig(SamplerName.nsga2, population=4), found, directions=2)
    for _ in range(12):
        number, params = next_point(study, found)
        study.tell(number, [params["x"], 1 - params["x"]])
    assert len(study.best_trials) == 12, "every point is on the front"


def test_a_sampler_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"scipy and torch.*mgm-exp\[search\]"):
        make_sampler(SamplerConfig(SamplerName.gp), space())


@pytest.mark.parametrize(
    ("config", "stopped"),
    [
        (PrunerConfig(PrunerName.none), []),
        (PrunerConfig(PrunerName.asha, reduction_factor=2), [1, 2, 3]),
        (PrunerConfig(PrunerName.asha, min_step=20, reduction_factor=2), [1, 2, 3]),
        (PrunerConfig(PrunerName.median, startup=1), [1, 2, 3]),
        (PrunerConfig(PrunerName.median, startup=4), []),
        (PrunerConfig(PrunerName.patient, startup=1, patience=1), [1, 2, 3]),
        (PrunerConfig(PrunerName.hyperband, reduction_factor=2), None),
    ],
)
def test_every_pruner_by_its_name(tmp_path: Path, config: PrunerConfig, stopped: list[int] | None) -> None:
    study = optuna.create_study(
        direction="maximize",
        storage=open_storage(str(tmp_path / "j")),
        pruner=make_pruner(config, 10),
    )
    found = []
    for number in range(4):  # each one is worse than the one before, and none gets better while it goes on
        trial = study.ask()
        state = None
        for step in (10, 20, 30, 40):
            trial.report(1.0 - number / 10 - step / 1000, step)
            if trial.should_prune():
                state, at = TrialState.PRUNED, step
                assert config.min_step is None or at >= config.min_step
                break
        study.tell(trial, None if state else 1.0 - number / 10, state=state)
        found += [number] if state else []
    if stopped is not None:
        assert found == stopped


def test_wilcoxon_compares_seeds(tmp_path: Path) -> None:
    study = optuna.create_study(
        direction="maximize", pruner=make_pruner(PrunerConfig(PrunerName.wilcoxon, startup=2, p_threshold=0.2))
    )
    scipy = importlib.util.find_spec("scipy")
    if scipy is None:
        pytest.skip("wilcoxon needs scipy, which is not installed")
    best = study.ask()
    for seed in range(6):
        best.report(0.9 + seed / 100, seed)
    study.tell(best, 0.9)
    worse = study.ask()
    answers = []
    for seed in range(6):
        worse.report(0.5 + seed / 100, seed)
        answers.append(worse.should_prune())
    assert answers[0] is False and answers[-1] is True
