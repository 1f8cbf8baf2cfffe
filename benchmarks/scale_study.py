"""A study of 10,000 trials and 64 workers: journal, SQLite, PostgreSQL, and SQLite behind ``mgm-exp study-server``.

A study is filled with n finished trials. Then up to 64 worker processes, each with a storage of its own, go through
trials that do nothing: ask, two parameters, three validation points with the pruner's answer, two attributes, tell.
Between these steps a worker thinks for a random time, so that what is measured is the storage and not the queue for two
cores. The latency of every step is noted; afterwards the study is read anew, and every trial that a worker told has to
be in it once, with its value, its points and its attributes: anything else is a lost update.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.measurement import Row

# Trials in the study -> workers. To open a study of 10,000 trials takes seconds of processor time, in each worker: on a
# small machine 64 of them would measure nothing else.
SIZES, SIZES_QUICK = {0: 64, 1_000: 64, 10_000: 16}, {0: 4, 50: 4}
TRIALS_EACH, TRIALS_EACH_QUICK = 5, 2
THINK_S, THINK_S_QUICK = 16.0, 0.2  # of a trial, in all
POINTS = 3
STORAGES = ("journal", "sqlite", "server", "postgresql")
STEPS = ("ask", "report", "tell")


def run(work: Path, quick: bool = False) -> list[Row]:
    """Measures every storage that this machine has, at every size."""
    sizes = SIZES_QUICK if quick else SIZES
    if "SCALE_SIZES" in os.environ:  # 1000:64,10000:16
        sizes = {int(size): int(n) for size, n in (item.split(":") for item in os.environ["SCALE_SIZES"].split(","))}
    rows = []
    for kind in os.environ.get("SCALE_STORAGES", ",".join(STORAGES)).split(","):
        with _storage(kind, work / kind) as place:
            if place is None:
                print(f"{kind}: not here", flush=True)
                continue
            found = {}
            for size, workers in sizes.items():
                found[size] = measure(place, work / kind, size, workers, quick=quick)
                print(json.dumps({kind: {size: found[size]}}), flush=True)
        rows += _rows(kind, found)
    return rows


def _rows(kind: str, found: dict[int, dict[str, Any]]) -> list[Row]:
    small, large = min(found), max(found)
    rows = []
    for step in STEPS:
        first, last = found[small][step], found[large][step]
        told = sum(one["told"] for one in found.values())
        lost = sum(one["lost"] for one in found.values())
        rows.append(
            Row(
                f"{kind}: {step} at {large:,} trials, and at {small:,}",
                "ms",
                last["median"],
                first["median"],
                None,
                f"0 of {told} trials lost" if lost == 0 else f"DIFFERENT: {lost} of {told} trials lost",
                f"{found[large]['workers']} and {found[small]['workers']} workers; medians; p99 "
                f"{last['p99']:.0f} and {first['p99']:.0f} ms; "
                f"{found[large]['rate']:.1f} trials/s; "
                f"open and read all {found[large]['open_s']:.1f} s; {found[large]['mib']:.1f} MiB",
            )
        )
    return rows


def measure(place: str, folder: Path, size: int, workers: int, *, quick: bool) -> dict[str, Any]:
    """Workers on a study of ``size`` finished trials: latencies in ms, and what was lost."""
    import optuna

    from mgm_exp.search import open_storage

    each, think_s = (TRIALS_EACH_QUICK, THINK_S_QUICK) if quick else (TRIALS_EACH, THINK_S)
    name, where = f"s{size}", place.replace("SIZE", str(size))
    study = optuna.create_study(storage=open_storage(where), study_name=name, direction="maximize")
    filled_s = _fill(study, size)
    before = time.perf_counter()
    study = optuna.load_study(storage=open_storage(where), study_name=name)
    study.get_trials(deepcopy=False)
    open_s = time.perf_counter() - before
    # forkserver: one process imports, and forks before it has opened anything
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.scale_study", "optuna", "sqlalchemy"])
    results = context.Queue()
    began = time.perf_counter()
    processes = [
        context.Process(target=work_on, args=(where, name, number, each, think_s, results)) for number in range(workers)
    ]
    for process in processes:
        process.start()
    notes = [results.get(timeout=1800) for _ in processes]
    for process in processes:
        process.join()
    took_s = time.perf_counter() - began
    study = optuna.load_study(storage=open_storage(where), study_name=name)
    told = [trial for note in notes for trial in note["told"]]
    found: dict[str, Any] = {
        "workers": workers,
        "told": len(told),
        "lost": _lost(study, size, told),
        "filled_s": round(filled_s, 1),
        "open_s": round(open_s, 2),
        "rate": len(told) / took_s,
        "cpu_ms_a_trial": round(1000 * sum(note["cpu_s"] for note in notes) / max(1, len(told)), 1),
        "mib": _size(folder),
    }
    for step in STEPS:
        times = sorted(value for note in notes for value in note[step])
        found[step] = {"median": statistics.median(times), "p99": times[int(0.99 * (len(times) - 1))]}
    return found


def _fill(study: Any, size: int) -> float:
    """Finished trials, as they are after a search."""
    import optuna

    before = time.perf_counter()
    space = {
        "train.lr": optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True),
        "adapter.rank": optuna.distributions.IntDistribution(1, 64),
    }
    chance = random.Random(size)
    for number in range(size):
        value = chance.random()
        study.add_trial(
            optuna.trial.create_trial(
                params={"train.lr": chance.uniform(1e-4, 1e-2), "adapter.rank": chance.randint(1, 64)},
                distributions=space,
                value=value,
                intermediate_values={point: value * point / POINTS for point in range(1, POINTS + 1)},
                user_attrs={"verdict": "completed", "values": [value]},
            )
        )
        if number == 0:
            before = time.perf_counter()
    return time.perf_counter() - before


def work_on(place: str, name: str, worker: int, trials: int, think_s: float, results: Any) -> None:
    """One worker: ``trials`` trials; says how long each step took, and what it told."""
    import optuna

    from mgm_exp.search import open_storage
    from mgm_exp.store import die_with_parent

    die_with_parent()
    chance = random.Random(worker)
    study = optuna.load_study(
        storage=open_storage(place),
        study_name=name,
        sampler=optuna.samplers.RandomSampler(seed=worker),
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3),
    )
    study.get_trials(deepcopy=False)  # as a sweeper that is at work has; what this costs is measured by itself
    note: dict[str, Any] = {step: [] for step in STEPS} | {"told": []}

    def think() -> None:
        time.sleep(chance.expovariate((POINTS + 2) / think_s))

    def timed(step: str, call: Any) -> Any:
        before = time.perf_counter()
        found = call()
        note[step].append(1000 * (time.perf_counter() - before))
        return found

    time.sleep(chance.random() * think_s)
    began = time.process_time()
    for _ in range(trials):
        think()
        trial = timed("ask", study.ask)
        value = trial.suggest_float("train.lr", 1e-4, 1e-2, log=True) * 50 + trial.suggest_int("adapter.rank", 1, 64)
        points = {}
        for point in range(1, POINTS + 1):
            think()
            points[point] = value * point / POINTS
            timed("report", lambda: (trial.report(points[point], point), trial.should_prune()))  # noqa: B023
        think()
        trial.set_user_attr("verdict", "completed")
        trial.set_user_attr("worker", worker)
        timed("tell", lambda: study.tell(trial, value))  # noqa: B023
        note["told"].append((trial.number, value, points))
    note["cpu_s"] = time.process_time() - began
    results.put(note)


def _lost(study: Any, size: int, told: list[tuple[int, float, dict[int, float]]]) -> int:
    """Trials that are not in the study as they were told, or that two workers were given."""
    there = {trial.number: trial for trial in study.get_trials(deepcopy=False)}
    lost = len(told) - len({number for number, _, _ in told}) + abs(len(there) - size - len(told))
    for number, value, points in told:
        trial = there.get(number)
        is_whole = (
            trial is not None
            and trial.state.name == "COMPLETE"
            and trial.value == value
            and trial.intermediate_values == points
            and set(trial.user_attrs) >= {"verdict", "worker"}
            and len(trial.params) == 2
        )
        lost += not is_whole
    return lost


def _size(folder: Path) -> float:
    """MiB on disk, of the newest study alone where each has a file of its own."""
    files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_mtime)
    return sum(path.stat().st_size for path in files[-1:]) / 2**20 if files else 0.0


@contextmanager
def _storage(kind: str, folder: Path) -> Iterator[str | None]:
    """The place of a study, SIZE in it standing for the number of trials; None where this machine has none."""
    folder.mkdir(parents=True)
    if kind == "journal":
        yield str(folder / "SIZE.journal")
    elif kind == "sqlite":
        yield f"sqlite:///{folder / 'SIZE.db'}"
    elif kind == "server":
        with _server(f"sqlite:///{folder / 'served.db'}") as address:
            yield address
    else:
        yield from _postgresql()


@contextmanager
def _server(database: str) -> Iterator[str | None]:
    try:
        import grpc  # noqa: F401
    except ImportError:
        yield None
        return
    command = [sys.executable, "-m", "mgm_exp.cli", "study-server", database, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[0].removeprefix("sweep.storage=")
        finally:
            process.terminate()


def _postgresql() -> Iterator[str | None]:
    from tests.search.postgres_server import postgres_server

    try:
        with postgres_server("-c max_connections=300") as url:
            yield url
    except RuntimeError as error:
        print(error)
        yield None


if __name__ == "__main__":  # DIR: one folder for the studies; SCALE_STORAGES chooses
    for row in run(Path(sys.argv[1]), quick="--quick" in sys.argv):
        print(row.name, f"{row.ours:.1f} {row.peer:.1f}", row.exactness, row.evidence)
