"""A stage is killed at each system call by which it changes the disk: no committed checkpoint is lost, and the next
attempt ends as an undisturbed one (needs strace)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mgm_exp.store import newest_whole
from tests.fault_table import met
from tests.system_calls import CHANGES, Traced, strace_or_skip

from .committing import job_of
from .test_loop import losses, output_bytes

SCENARIO = "tests.train.committing:train"
NTH = 400


@pytest.mark.timeout(7200)
@pytest.mark.slow
def test_killed_at_each_system_call_it_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    strace_or_skip()
    folder, points = tmp_path / "stage", []

    def prepare() -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    with Traced(SCENARIO) as clean, Traced(SCENARIO, CHANGES, nth=NTH) as traced:
        assert clean.run(prepare())[0] == 0
        undisturbed = losses(job_of(folder)), output_bytes(job_of(folder))
        for point, said in traced.each_call(prepare, CHANGES, nth=NTH):
            promised = [line.removeprefix("committed ") for line in said.splitlines() if line.startswith("committed")]
            checkpoints = job_of(folder).checkpoints
            found, _ = newest_whole(checkpoints) if checkpoints.is_dir() else (None, [])
            assert not promised or (found is not None and found.name >= promised[-1]), point
            code, again = clean.run(folder)
            assert code == 0, (point, again)
            assert (losses(job_of(folder)), output_bytes(job_of(folder))) == undisturbed, point
            points.append(point)
    assert len(points) >= 100, points
    met("kill: training", len(points))
