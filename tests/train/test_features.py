"""Visual tokens that are encoded once train as images that are encoded in every step do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mgm_exp.errors import DataError
from mgm_exp.train import TrainJob, encode_images_once, run_stage
from mgm_exp.train.metrics_file import read_rows

MakeJob = Callable[..., TrainJob]
SETTINGS: dict[str, Any] = {"steps": 3, "micro_batch": 2, "freeze_connector": True}


def test_cached_tokens_give_the_same_steps(make_job: MakeJob) -> None:
    encoded = make_job("features", name="features", **SETTINGS)
    heard: list[tuple[str, int, int]] = []
    facts = encode_images_once(encoded, on_progress=lambda *progress: heard.append(progress))
    assert facts["images"] == 5
    assert heard[-1][1:] == (5, 5)
    assert sorted(path.name for path in encoded.out.iterdir()) == ["index.json", "tokens.safetensors"]

    job = make_job(name="images", **SETTINGS)
    run_stage(job)
    cached = dataclasses.replace(make_job(name="cached", **SETTINGS), visual_tokens=encoded.out)
    summary = run_stage(cached)
    assert summary.trainable["n_other"] == 0
    assert summary.trainable["verified"]["is_complete"]
    expected = [(row["loss"], row["grad_norm"], row["tokens"]) for row in read_rows(job.metrics)]
    assert len(expected) == 3
    got = [(row["loss"], row["grad_norm"], row["tokens"]) for row in read_rows(cached.metrics)]
    assert got == [pytest.approx(row, rel=1e-5) for row in expected]


def test_an_aligned_connector_is_what_encodes(make_job: MakeJob, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    aligned = make_job("align", name="align", steps=1)
    run_stage(aligned)
    plain = make_job("features", name="plain", **SETTINGS)
    after = dataclasses.replace(
        make_job("features", name="after", **SETTINGS), connector=aligned.out / "connector.safetensors"
    )
    for job in (plain, after):
        encode_images_once(job)
    before, moved = (load_file(job.out / "tokens.safetensors")["tokens"] for job in (plain, after))
    assert before.shape == moved.shape == (5, 16, 64)
    assert not before.equal(moved)


def test_an_image_that_is_gone_is_named(make_job: MakeJob) -> None:
    job = make_job("features", **SETTINGS)
    job.records.write_text(job.records.read_text().replace("wide.png", "gone.png"))
    with pytest.raises(DataError, match=r"gone\.png"):
        encode_images_once(job)
