"""A profile says where the time went, and changes no bit."""

from __future__ import annotations

import dataclasses
import gzip
import json

import pytest

from mgm_exp.config import validate
from mgm_exp.errors import ConfigError
from mgm_exp.train import TrainJob, run_stage
from mgm_exp.train.metrics_file import read_rows
from mgm_exp.train.time_shares import PARTS

from .conftest import experiment, job_in
from .test_loop import losses, output_bytes

Profiled = tuple[TrainJob, TrainJob, list[str]]


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Profiled:
    """One stage without a profile, and one with; and what the second one said."""
    folder, said = tmp_path_factory.mktemp("profiled"), list[str]()
    plainly = job_in(folder, name="plain", steps=6, every_steps=3)
    run_stage(plainly)
    job = dataclasses.replace(
        job_in(folder, name="profiled", steps=6, every_steps=3, profile=True), profile=folder / "profile"
    )
    run_stage(job, say=said.append)
    return plainly, job, said


def test_a_profile_changes_no_bit(profiled: Profiled) -> None:
    plainly, job, _ = profiled
    assert len(losses(job)) == 6  # it was really trained
    assert losses(job) == losses(plainly)
    assert output_bytes(job) == output_bytes(plainly)


def test_it_says_where_the_time_went(profiled: Profiled) -> None:
    _, job, said = profiled
    assert job.profile is not None
    found = json.loads((job.profile / "profile.json").read_text())["stages"]["instruct"]
    assert found["steps"] == 2 and set(found["shares"]) == set(PARTS)
    assert sum(found["shares"].values()) == pytest.approx(1, abs=1e-3)
    assert min(found["shares"][part] for part in ("llm", "vision", "optimizer")) > 0.005
    steps = [row for row in read_rows(job.metrics) if "event" not in row]
    assert found["seconds_per_step"] < 100 * max(float(row["seconds"]) for row in steps)
    told = next(line for line in said if "profile of 2 steps" in line)
    assert "LLM" in told and "vision" in told and "%" in told


def test_the_trace_holds_whole_steps_and_is_bounded(profiled: Profiled) -> None:
    _, job, _ = profiled
    assert job.profile is not None
    trace = job.profile / "instruct.trace.json.gz"
    assert trace.stat().st_size < 8 << 20
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert sum(str(e["name"]).startswith("ProfilerStep#") for e in events if e.get("cat") == "user_annotation") == 2


@pytest.mark.parametrize("value", [0, -1, 51, 2.5, "often"])
def test_another_number_of_steps_is_refused_in_words(value: object) -> None:
    config = experiment()
    config.train.profile = value
    with pytest.raises(ConfigError, match=r"train\.profile=.*1 to 50"):
        validate(config)
