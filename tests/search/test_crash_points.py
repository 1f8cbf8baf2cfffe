"""A search that is killed at every change of the disk ends as an undisturbed one: nothing lost, nothing repeated.

The first test kills at each call that Python makes; the others let the kernel deliver the kill at each system call,
which SQLite makes by itself (needs strace).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.fault_table import met
from tests.search import campaign_scenario as scenario
from tests.store.crash_points import run_to_change
from tests.system_calls import Traced, count_calls, strace_or_skip, stride

REPOSITORY = Path(__file__).resolve().parents[2]
TRIALS = 3
TO_THE_END = 10**9
# Every so many-th change is tried, in the quick run and in the slow one (CRASH_POINTS=all: all of them).
EVERY, OFTEN = 40, 4


def run(folder: Path, kill_at: int = TO_THE_END, storage: str | None = None) -> Any:
    """The search in a forked process that dies at its n-th change: None then, else what came of it."""
    point = run_to_change(
        lambda say: say(json.dumps(scenario.summary(scenario.search(folder, TRIALS, storage)))), kill_at
    )
    return json.loads(point.said[-1]) if point.is_last else None


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    found = run(tmp_path_factory.mktemp("undisturbed") / "s")
    assert [status for _, status, _, _ in found] == ["completed", "pruned", "completed"]
    return found


def state(folder: Path) -> dict[int, tuple[int, bool]]:
    """Of each trial's folder: how often it was called, and whether it had come to its result."""
    return {
        number: (scenario.calls(folder, number), (folder / str(number) / "result.json").exists())
        for number in range(TRIALS)
    }


def check(folder: Path, before: dict[int, tuple[int, bool]], after: Any, undisturbed: Any, point: Any) -> None:
    assert after == undisturbed, point
    for number, (called, had_result) in before.items():
        now = scenario.calls(folder, number)
        assert now == (called if had_result else called + 1), (point, number, "a finished trial is not repeated")
        steps = (folder / str(number) / "steps.txt").read_text().split()
        assert sorted(set(steps)) == ["1", "2"] and len(steps) <= 3, (point, "what is checkpointed is not repeated")
        reports = [
            json.loads(line)["step"] for line in (folder / str(number) / "reports.jsonl").read_text().splitlines()
        ]
        assert reports == [1, 2], point
    assert not list((folder / ".claims").glob("*")), point
    assert {path.name for path in folder.iterdir() if path.name.isdigit()} == {"0", "1", "2"}, point


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("every", [EVERY, pytest.param(OFTEN, marks=pytest.mark.slow)])
def test_killed_at_each_change_it_ends_as_if_undisturbed(tmp_path: Path, undisturbed: Any, every: int) -> None:
    every = 1 if every == OFTEN and os.environ.get("CRASH_POINTS") == "all" else every
    folder, kill_at, points = tmp_path / "s", 1 + random.Random(0).randrange(every), 0
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        killed = run(folder, kill_at) is None
        before = state(folder)
        check(folder, before, run(folder), undisturbed, kill_at)
        if not killed:
            break
        kill_at, points = kill_at + every, points + 1
    assert points * every > 400, "the kills do not reach the search"
    met("kill: sweep", points)


def test_killed_again_and_again_it_still_gets_there(tmp_path: Path, undisturbed: Any) -> None:
    folder, chance, kills = tmp_path / "s", random.Random(1), 0
    while (after := run(folder, chance.randrange(60, 260))) is None:
        kills += 1
    assert after == undisturbed
    assert kills >= 4
    met("kill: sweep", kills)
    assert {path.name for path in folder.iterdir() if path.name.isdigit()} == {"0", "1", "2"}


# -- the kernel's view ------------------------------------------------------------------------------------------------

NTH = 3000
# Points of each kind of call in the slow run, spread evenly; about 1 s of processor time for each.
POINTS = 20


@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("storage", "calls"),
    [
        ("sqlite", {"pwrite64": 3}),  # of some 700
        pytest.param("sqlite", None, marks=pytest.mark.slow),
        pytest.param("journal", None, marks=pytest.mark.slow),
    ],
)
def test_killed_at_system_calls_it_ends_as_if_undisturbed(
    tmp_path: Path, undisturbed: Any, storage: str, calls: dict[str, int] | None
) -> None:
    """``calls``: how many points of which; None: of all that the search makes."""
    strace_or_skip()
    program, folder = f"tests.search.committing:with_{storage}", tmp_path / "s"

    def prepare() -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    made = dict.fromkeys(calls, 700) if calls else count_calls(program, prepare())
    assert calls or len(made) >= 6, made
    with Traced(program, list(made), nth=NTH) as traced:
        for call, number in made.items():
            wanted = (calls or {}).get(call, POINTS)
            every, met_at = stride(number, wanted), 0
            for point, _ in traced.each_call(prepare, [call], nth=NTH, first=(1 + every) // 2, every=every):
                before = state(folder)
                check(folder, before, run(folder, storage=storage_of(storage)), undisturbed, (storage, point))
                met_at += 1
            print(f"{storage}: {call}: {met_at} of {number}")
            assert met_at >= min(number, wanted) // 2, (call, number)
            met("kill: sweep", met_at)


def storage_of(name: str) -> str | None:
    return None if name == "journal" else name


# -- several sweepers, random kills -----------------------------------------------------------------------------------


def start(folder: Path, trials: int, storage: str, step_s: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.search.campaign_scenario", str(folder), str(trials), storage, str(step_s)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def chaos(folder: Path, storage: str, *, trials: int, kills: int, seed: int = 0, step_s: float = 0.4) -> dict[str, int]:
    """Three sweepers on one study; one of them is killed and replaced, again and again, while it works.

    The second half of the trials waits for the last kill: on a busy machine all would be over before.

    Returns:
        ``{"trials", "kills", "repeated_steps", "seconds"}`` once all trials are there and everything was checked.
    """
    chance, began = random.Random(seed), time.monotonic()
    scenario.hold_file(folder).write_text(str(trials // 2))
    workers, killed = [start(folder, trials, storage, step_s) for _ in range(3)], 0
    try:
        for _ in range(kills):
            victim = chance.randrange(3)
            line = workers[victim].stdout.readline()  # type: ignore[union-attr]
            while line and not line.startswith("trial "):  # it is at work
                line = workers[victim].stdout.readline()  # type: ignore[union-attr]
            assert line, workers[victim].wait(timeout=60)
            time.sleep(chance.random() * 2.5 * step_s)
            workers[victim].kill()
            workers[victim].communicate()
            killed += workers[victim].returncode == -signal.SIGKILL
            workers[victim] = start(folder, trials, storage, step_s)
        scenario.hold_file(folder).unlink()
        for worker in workers:
            output, _ = worker.communicate(timeout=300)
            assert worker.returncode == 0, output
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
                worker.communicate()
    content = json.loads((folder / "sweep.json").read_text())
    assert [(t["number"], t["status"]) for t in content["trials"]] == [(n, "completed") for n in range(trials)]
    assert content["pending"] == []
    import optuna

    from mgm_exp.search import open_storage, storage_place

    place = storage_place(None if storage == "journal" else storage, folder)
    study = optuna.load_study(study_name=folder.name, storage=open_storage(place))
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * trials, "no zombie, none lost"
    assert not list((folder / ".claims").glob("*"))
    repeated = 0
    for number in range(trials):
        steps = (folder / str(number) / "steps.txt").read_text().split()
        assert sorted(set(steps)) == ["1", "2"]
        assert len(steps) - 2 <= scenario.calls(folder, number) - 1, "a kill repeats one step at most"
        repeated += len(steps) - 2
    return {"trials": trials, "kills": killed, "repeated_steps": repeated, "seconds": round(time.monotonic() - began)}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("storage", "trials", "kills"),
    [
        ("journal", 7, 2),
        pytest.param("journal", 40, 15, marks=pytest.mark.slow),
        pytest.param("sqlite", 40, 15, marks=pytest.mark.slow),
    ],
)
def test_three_sweepers_and_kills_lose_nothing_and_repeat_nothing(
    tmp_path: Path, storage: str, trials: int, kills: int
) -> None:
    found = chaos(tmp_path / "s", storage, trials=trials, kills=kills)
    print(storage, found)
    assert found["kills"] == kills
    met("kill: sweepers", kills)
