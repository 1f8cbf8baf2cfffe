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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.search import campaign_scenario as scenario
from tests.store.crash_points import run_to_change

REPOSITORY = Path(__file__).resolve().parents[2]
TRIALS = 3
TO_THE_END = 10**9
# In the quick run every so many-th point is tried; the slow run tries them all.
EVERY = 20


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


@pytest.mark.parametrize("every", [EVERY, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_each_change_it_ends_as_if_undisturbed(tmp_path: Path, undisturbed: Any, every: int) -> None:
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


def test_killed_again_and_again_it_still_gets_there(tmp_path: Path, undisturbed: Any) -> None:
    folder, chance, kills = tmp_path / "s", random.Random(1), 0
    while (after := run(folder, chance.randrange(60, 260))) is None:
        kills += 1
    assert after == undisturbed
    assert kills >= 4
    assert {path.name for path in folder.iterdir() if path.name.isdigit()} == {"0", "1", "2"}


# -- the kernel's view ------------------------------------------------------------------------------------------------

NTH = 3000
SERVER = """
import os, sys, traceback
sys.path.insert(0, os.getcwd())
from pathlib import Path
from tests.search import campaign_scenario as scenario
import optuna.storages  # everything that a search loads, before strace counts
import sqlalchemy.dialects.sqlite
import json
root = Path(sys.argv[1])
storage = None if sys.argv[2] == "journal" else sys.argv[2]
scenario.search(root / "warm", 1, storage)

nowhere, null, here = "/nowhere/at/all", os.open("/dev/null", os.O_WRONLY), os.open("/", os.O_RDONLY)
WASTE = {
    "write": lambda: os.write(null, b"x"),
    "pwrite64": lambda: os.pwrite(null, b"x", 0),
    "fsync": lambda: os.fsync(null),
    "fdatasync": lambda: os.fdatasync(null),
    "ftruncate": lambda: os.ftruncate(null, 0),
    "rename": lambda: os.rename(nowhere, nowhere),
    "unlink": lambda: os.unlink(nowhere),
    "mkdir": lambda: os.mkdir(nowhere),
    "linkat": lambda: os.link(nowhere, nowhere),
    "rmdir": lambda: os.rmdir(nowhere),
    "utimensat": lambda: os.utime(nowhere),
}

for line in sys.stdin:
    folder, call, number = line.split()
    pid = os.fork()
    if pid == 0:
        for _ in range(int(os.environ["NTH"]) - int(number) if call in WASTE else 0):
            try:
                WASTE[call]()
            except OSError:
                pass
        try:
            content = scenario.search(Path(folder), 3, storage)
            os.writev(1, [("\\nresult " + json.dumps(scenario.summary(content)) + "\\n").encode()])
        except BaseException:
            os.writev(1, [traceback.format_exc().encode()])
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.writev(1, [f"\\nended {code}\\n".encode()])
"""
CALLS = [
    "pwrite64",
    "fdatasync",
    "write",
    "fsync",
    "ftruncate",
    "rename",
    "unlink",
    "mkdir",
    "linkat",
    "rmdir",
    "utimensat",
]


class Server:
    """Runs the search in forked processes, with or without the fault."""

    def __init__(self, folder: Path, storage: str, call: str | None) -> None:
        command = [sys.executable, "-B", "-c", SERVER, str(folder), storage]
        if call is not None:
            trace = ["-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:when={NTH}"]
            command = ["strace", "-f", "-qq", "-o", os.devnull, *trace, *command]
        folder.mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "NTH": str(NTH)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def search(self, folder: Path, call: str = "-", number: int = 0) -> tuple[int, Any]:
        """Exit code and what came of it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{folder} {call} {number}\n")
        self.process.stdin.flush()
        said, result = "", None
        while not (line := self.process.stdout.readline()).startswith("ended"):
            assert line, f"the server ended: {said}"
            said += line
            if line.startswith("result "):
                result = json.loads(line.removeprefix("result "))
        code = int(line.split()[1])
        assert code in (0, -9), said
        return code, result

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


@pytest.fixture(scope="module")
def strace() -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    probe = subprocess.run(["strace", "-f", "-qq", "-o", os.devnull, "true"], capture_output=True)
    if probe.returncode != 0:
        pytest.skip(f"strace may not trace here: {probe.stderr.decode().strip()}")


def each_point(server: Server, folder: Path, call: str, every: int) -> Iterator[tuple[str, int]]:
    """The search killed at the first, second, ... call of a kind, until it ran through."""
    for number in range(1 + every // 2, NTH, every):
        shutil.rmtree(folder, ignore_errors=True)
        code, _ = server.search(folder, call, number)
        if code == 0:
            return
        yield f"{call} {number}", code
    raise AssertionError(f"more than {NTH} calls of {call}: the scenario is too long for this harness")


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("storage", "calls", "every", "least"),
    [
        ("sqlite", ["pwrite64", "fdatasync"], 200, 3),
        pytest.param("sqlite", CALLS, 1, 500, marks=pytest.mark.slow),
        pytest.param("journal", CALLS, 1, 200, marks=pytest.mark.slow),
    ],
)
def test_killed_at_each_system_call_it_ends_as_if_undisturbed(
    tmp_path: Path, strace: None, undisturbed: Any, storage: str, calls: list[str], every: int, least: int
) -> None:
    points = []
    clean = Server(tmp_path / "clean", storage, None)
    try:
        for call in calls:
            server = Server(tmp_path / call, storage, call)
            try:
                for point, _ in each_point(server, tmp_path / "s", call, every):
                    before = state(tmp_path / "s")
                    _, after = clean.search(tmp_path / "s")
                    check(tmp_path / "s", before, after, undisturbed, (storage, point))
                    points.append(point)
            finally:
                server.close()
    finally:
        clean.close()
    print(f"{storage}: {len(points)} points")
    assert len(points) >= least, points


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
@pytest.mark.parametrize("storage", ["journal", "sqlite"])
@pytest.mark.parametrize(
    ("trials", "kills"), [(9, 4), pytest.param(60, 25, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_three_sweepers_and_kills_lose_nothing_and_repeat_nothing(
    tmp_path: Path, storage: str, trials: int, kills: int
) -> None:
    found = chaos(tmp_path / "s", storage, trials=trials, kills=kills)
    print(storage, found)
    assert found["kills"] == kills
