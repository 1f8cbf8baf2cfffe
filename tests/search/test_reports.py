"""Validation points of a run: written down, reported to the study once, and answered."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from mgm_exp.config import Direction, ExperimentConfig, PrunerConfig, PrunerName, SweepConfig, ValidationConfig
from mgm_exp.search.pruners import make_pruner
from mgm_exp.search.reports import Report, Reporter, read_reports, reporter_for, study_name, sweep_folder
from mgm_exp.search.study import open_storage, open_study
from tests.test_stages import base


def study_in(folder: Path) -> optuna.Study:
    return open_study(
        open_storage(str(folder / "study.journal")),
        study_name(folder),
        [Direction.maximize],
        optuna.samplers.RandomSampler(),
        make_pruner(PrunerConfig(PrunerName.median, startup=1)),
    )


def config_of(number: int | None, **sweep: object) -> ExperimentConfig:
    settings = SweepConfig(pruner=PrunerConfig(PrunerName.median, min_step=20, startup=1), **sweep)  # type: ignore[arg-type]
    train = replace(base().train, validation=ValidationConfig(every_steps=10))
    return replace(base(), trial=number, sweep=settings, train=train)


@pytest.fixture
def second(tmp_path: Path) -> tuple[optuna.Study, Path]:
    """A study with one good trial, and the folder of the second."""
    study = study_in(tmp_path)
    good = study.ask()
    for step in (10, 20, 30):
        good.report(0.8, step)
    study.tell(good, 0.8)
    assert study.ask().number == 1
    (tmp_path / "1").mkdir()
    return study, tmp_path / "1"


def test_a_trial_reports_to_the_study_and_is_stopped(second: tuple[optuna.Study, Path]) -> None:
    study, run_dir = second
    reporter = reporter_for(config_of(1), run_dir)
    assert reporter.report(10, 0.5) is False
    assert reporter.report(20, 0.1) is True
    assert reporter.was_stopped
    assert study.trials[1].intermediate_values == {10: 0.5, 20: 0.1}
    assert [json.loads(line) for line in (run_dir / "reports.jsonl").read_text().splitlines()] == [
        {"step": 10, "value": 0.5, "stop": False}, {"step": 20, "value": 0.1, "stop": True},
    ]  # fmt: skip


def test_a_run_that_is_continued_does_not_report_twice_and_remembers_its_answer(
    second: tuple[optuna.Study, Path],
) -> None:
    study, run_dir = second
    first = reporter_for(config_of(1), run_dir)
    first.report(10, 0.5)
    first.report(20, 0.1)
    again = reporter_for(config_of(1), run_dir)
    assert again.was_stopped and again.last_step == 20
    assert again.report(10, 0.3) is True, "what it was told holds"
    assert study.trials[1].intermediate_values == {10: 0.5, 20: 0.1}
    assert len(read_reports(run_dir / "reports.jsonl")) == 2


@pytest.mark.parametrize(
    "config",
    [
        config_of(None),
        config_of(1, objectives=["a", "b"], directions=[Direction.maximize] * 2),
        replace(config_of(1), sweep=SweepConfig(pruner=PrunerConfig(PrunerName.none))),
        replace(config_of(1), sweep=SweepConfig(pruner=PrunerConfig(PrunerName.wilcoxon))),
    ],
    ids=["a single run", "several objectives", "no pruner", "pruned between seeds"],
)
def test_who_cannot_be_pruned_only_writes_down(tmp_path: Path, config: ExperimentConfig) -> None:
    reporter = reporter_for(config, tmp_path)
    assert reporter.report(10, 0.0) is False
    assert read_reports(tmp_path / "reports.jsonl") == [Report(10, 0.0)]
    assert not (tmp_path.parent / "study.journal").exists()


def test_only_the_first_seed_of_a_trial_reports(tmp_path: Path) -> None:
    run_dir = tmp_path / "4" / "seed_7"
    assert sweep_folder(run_dir) == tmp_path == sweep_folder(tmp_path / "4")
    run_dir.mkdir(parents=True)
    (tmp_path / "4" / "seed_8").mkdir()
    assert reporter_for(config_of(4), run_dir)._open is not None
    assert reporter_for(config_of(4), tmp_path / "4" / "seed_8")._open is None


def test_a_study_that_does_not_answer_does_not_end_a_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def away() -> object:
        raise ConnectionError("no route")

    reporter = Reporter(tmp_path, away)
    with caplog.at_level(logging.WARNING):
        assert reporter.report(10, 0.5) is False
        assert reporter.report(20, 0.5) is False
    assert caplog.text.count("the study does not answer") == 1
    assert [report.step for report in read_reports(tmp_path / "reports.jsonl")] == [10, 20]


def test_a_trial_of_a_grid_asks_no_study(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "sweep.json").write_text('{"name": "s", "trials": []}')
    run_dir = tmp_path / "0"
    run_dir.mkdir()
    reporter = reporter_for(config_of(0), run_dir)
    with caplog.at_level(logging.WARNING):
        assert reporter.report(10, 0.5) is False and reporter.report(20, 0.6) is False
    assert caplog.text == "" and [report.step for report in read_reports(run_dir / "reports.jsonl")] == [10, 20]
    assert not (tmp_path / "study.journal").exists()


def test_a_run_pauses_at_the_first_point_from_its_rung_on_and_goes_on_with_a_later_one(tmp_path: Path) -> None:
    config = replace(config_of(None), sweep=SweepConfig(pause_after=15))
    reporter = reporter_for(config, tmp_path)
    assert not reporter.report(10, 0.5) and not reporter.is_paused
    assert reporter.report(20, 0.6) and reporter.is_paused and not reporter.was_stopped
    again = reporter_for(config, tmp_path)
    assert again.is_paused, "a run that was killed there need not train to know it"
    later = reporter_for(replace(config, sweep=SweepConfig(pause_after=30)), tmp_path)
    assert not later.is_paused and later.report(20, 0.6) is False and later.report(30, 0.7)


def test_damaged_reports_are_reported_again(tmp_path: Path) -> None:
    (tmp_path / "reports.jsonl").write_text('{"step": 10, "value": 0.5}\n{"step": 20, "val', encoding="utf-8")
    reporter = Reporter(tmp_path)
    assert [report.step for report in reporter.reports] == [10]
    reporter.report(20, 0.6)
    assert [report.step for report in read_reports(tmp_path / "reports.jsonl")] == [10, 20]
