"""What a worker has tokenised for one trial, the next one reads; nobody can change it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mgm_exp.data import kept_rows
from mgm_exp.model import family_of
from mgm_exp.train.assemble import open_dataset
from mgm_exp.train.job import TrainJob, stage_settings

MakeJob = Callable[..., TrainJob]


@pytest.fixture
def keeping() -> Iterator[None]:
    kept_rows.keep()
    yield
    kept_rows.stop_keeping()


def opened(job: TrainJob, max_length: int | None = None) -> Any:
    """The job's dataset, with a processor of its own."""
    config = job.experiment()
    settings = stage_settings(config, job.stage)
    length = max_length or settings.max_length
    return open_dataset(job, config, settings, family_of(config.model).processor(config.model, length, job.stage))


def encoded(dataset: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Reads all rows; those that were tokenised for it."""
    rows: list[int] = []
    encode = dataset.processor.encode
    with monkeypatch.context() as patched:
        patched.setattr(type(dataset.processor), "encode", lambda self, *a, **k: rows.append(1) or encode(*a, **k))
        for number in range(len(dataset)):
            dataset[number]
    return rows


def test_a_row_is_tokenised_once_for_all_trials(
    make_job: MakeJob, keeping: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = opened(make_job(name="first")), opened(make_job(name="second"))
    assert len(encoded(first, monkeypatch)) == len(first)
    assert encoded(second, monkeypatch) == []
    assert all(torch.equal(first[n][key], second[n][key]) for n in range(len(first)) for key in ("input_ids", "labels"))
    assert kept_rows.kept_gib() > 0


def test_a_run_that_changes_its_ids_changes_nobody_elses(
    make_job: MakeJob, keeping: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job()
    first = opened(job)
    before = first[0]["input_ids"].clone()
    first[0]["input_ids"].zero_()
    assert torch.equal(opened(job)[0]["input_ids"], before)
    (ids, labels), *_ = first._tokens.values()
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = labels[0] = 0


def test_other_rows_and_other_lengths_are_tokenised_anew(
    make_job: MakeJob, keeping: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = make_job(name="job")
    encoded(opened(job), monkeypatch)
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(job.records.read_text(encoding="utf-8").splitlines(keepends=True)[1:]), encoding="utf-8")
    assert encoded(opened(replace(job, records=fewer)), monkeypatch)
    assert encoded(opened(job, max_length=stage_settings(job.experiment(), job.stage).max_length - 1), monkeypatch)
    assert encoded(opened(job), monkeypatch) == []


def test_the_last_files_stay_and_without_keeping_none_does(make_job: MakeJob, keeping: None) -> None:
    rows = [kept_rows.rows_of(number) for number in range(5)]
    assert kept_rows.rows_of(4) is rows[4] and kept_rows.rows_of(1) is rows[1]
    assert kept_rows.rows_of(0) is not rows[0]
    kept_rows.stop_keeping()
    assert kept_rows.rows_of(1) is not kept_rows.rows_of(1)
    assert opened(make_job())._tokens is not opened(make_job(name="other"))._tokens
