"""A job survives the way to another process, and each stage reads its own settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mgm_exp.errors import ConfigError
from mgm_exp.train.job import TrainJob, derived_seed, stage_settings

from .conftest import experiment


def test_a_job_comes_back_from_json_as_it_was(make_job: Callable[..., TrainJob]) -> None:
    job = make_job("align", zero=2, devices=2)
    assert TrainJob.from_json(job.to_json()) == job


def test_an_unknown_stage_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pretrain.*align.*instruct"):
        TrainJob("pretrain", {}, tmp_path, tmp_path, None, None, tmp_path)


def test_each_stage_reads_its_own_section() -> None:
    config = experiment(global_batch=8, micro_batch=2, devices=2)
    config.train.align.lr, config.train.lr, config.train.projector_lr = 1e-3, 2e-4, 5e-5
    align, instruct = stage_settings(config, "align"), stage_settings(config, "instruct")
    assert (align.lr, align.connector_lr) == (1e-3, 1e-3)
    assert (instruct.lr, instruct.connector_lr) == (2e-4, 5e-5)
    assert instruct.accumulation == 8 // (2 * 2)
    assert align.seed != instruct.seed


def test_seeds_differ_by_purpose_and_are_the_same_everywhere() -> None:
    assert derived_seed(0, "instruct", 1, 2) == derived_seed(0, "instruct", 1, 2)
    assert len({derived_seed(seed, what, n) for seed in range(3) for what in "ab" for n in range(3)}) == 18
    assert derived_seed(0, "dropout") == 7938499265082287326
