"""A stage is killed at each system call by which it changes the disk: no committed checkpoint is lost, and the next
attempt ends as an undisturbed one (needs strace)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mgm_exp.store import newest_whole
from tests.fault_table import met
from tests.system_calls import CHANGES, Traced, count_calls, strace_or_skip, stride

from .committing import job_of
from .test_loop import losses, output_bytes

SCENARIO = "tests.train.committing:train"
NTH = 400
# Points of each kind of call, spread evenly where a stage makes more: about 2.5 s of processor time for each.
POINTS = 40
# The calls that a stage is known to make, and how often at least.
LEAST = {"write": 15, "fsync": 20, "rename": 10, "unlink": 5, "mkdir": 5, "ftruncate": 1}


@dataclass(frozen=True)
class Stage:
    """A stage that can be killed, one that is not, and what it leaves undisturbed."""

    folder: Path
    traced: Traced
    clean: Traced
    undisturbed: object
    calls: dict[str, int]

    def prepare(self) -> Path:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        return self.folder

    def left(self) -> object:
        return losses(job_of(self.folder)), output_bytes(job_of(self.folder))


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    strace_or_skip()
    folder = tmp_path_factory.mktemp("killed") / "stage"
    with Traced(SCENARIO) as clean, Traced(SCENARIO, CHANGES, nth=NTH) as traced:
        folder.mkdir()
        calls = count_calls(SCENARIO, folder)
        yield Stage(folder, traced, clean, (losses(job_of(folder)), output_bytes(job_of(folder))), calls)


@pytest.mark.timeout(7200)
@pytest.mark.slow
def test_killed_at_system_calls_of_every_kind_it_ends_as_an_undisturbed_one(stage: Stage) -> None:
    assert {call: number for call, number in LEAST.items() if stage.calls.get(call, 0) < number} == {}
    for call, number in stage.calls.items():
        points = 0
        for point, said in stage.traced.each_call(stage.prepare, [call], nth=NTH, every=stride(number, POINTS)):
            promised = [line.removeprefix("committed ") for line in said.splitlines() if line.startswith("committed")]
            checkpoints = job_of(stage.folder).checkpoints
            found, _ = newest_whole(checkpoints) if checkpoints.is_dir() else (None, [])
            assert not promised or (found is not None and found.name >= promised[-1]), point
            code, again = stage.clean.run(stage.folder)
            assert code == 0, (point, again)
            assert stage.left() == stage.undisturbed, point
            points += 1
        print(f"{call}: {points} of {number}")
        assert points >= min(number, POINTS) // 2, call
        met("kill: training", points)
