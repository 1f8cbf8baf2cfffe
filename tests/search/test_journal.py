"""The study's file: read by Optuna's own tools, never torn, shared by processes that are killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from mgm_exp.search.journal import StudyJournal
from tests.store.crash_points import run_to_change

REPOSITORY = Path(__file__).resolve().parents[2]


def records(path: Path) -> list[dict[str, Any]]:
    return list(StudyJournal(path).read_logs(0))


def test_optunas_own_backend_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    study = optuna.create_study(storage=JournalStorage(StudyJournal(path)), study_name="s")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
    other = optuna.load_study(storage=JournalStorage(JournalFileBackend(str(path))), study_name="s")
    assert [trial.params for trial in other.trials] == [trial.params for trial in study.trials]
    assert len(other.trials) == 3


def test_records_are_read_from_any_number_on(tmp_path: Path) -> None:
    journal = StudyJournal(tmp_path / "j")
    for number in range(5):
        journal.append_logs([{"n": number}, {"n": number + 0.5}])
    assert [row["n"] for row in journal.read_logs(7)] == [3.5, 4, 4.5]
    assert [row["n"] for row in StudyJournal(tmp_path / "j").read_logs(9)] == [4.5]
    assert list(journal.read_logs(10)) == []


def test_a_torn_last_line_is_not_read_and_not_built_upon(tmp_path: Path) -> None:
    path = tmp_path / "j"
    StudyJournal(path).append_logs([{"n": 1}])
    with open(path, "ab") as file:
        file.write(b'{"n": 2, "half')
    journal = StudyJournal(path)
    assert [row["n"] for row in journal.read_logs(0)] == [1]
    journal.append_logs([{"n": 3}])
    assert [row["n"] for row in journal.read_logs(0)] == [1, 3]
    assert path.read_bytes().endswith(b'{"n":3}\n')


def test_optunas_backend_does_not_survive_that_line(tmp_path: Path) -> None:
    """Why there is one of our own."""
    path = tmp_path / "j"
    backend = JournalFileBackend(str(path))
    backend.append_logs([{"n": 1}])
    with open(path, "ab") as file:
        file.write(b'{"n": 2, "half')
    backend.append_logs([{"n": 3}])
    backend.append_logs([{"n": 4}])
    with pytest.raises(json.JSONDecodeError):
        list(JournalFileBackend(str(path)).read_logs(0))


@pytest.mark.parametrize("torn", ["", '{"torn', "x" * 10_000])
def test_killed_at_each_change_of_the_file_it_loses_nothing_that_was_promised(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "j"

    def action(say: Any) -> None:
        journal = StudyJournal(path)
        for number in range(1, 4):
            journal.append_logs([{"n": number}])
            say(str(number))

    number = 0
    while True:
        number += 1
        path.write_text('{"n":0}\n' + torn)
        point = run_to_change(action, number, half_writes=True)
        found = [row["n"] for row in records(path)]
        promised = [int(line) for line in point.said]
        assert found[: 1 + len(promised)] == [0, *promised], point
        assert found == list(range(len(found))), point
        StudyJournal(path).append_logs([{"n": 99}])
        assert [row["n"] for row in records(path)][-1] == 99, point
        if point.is_last:
            break
    assert number > 12


WRITER = """
import sys
from pathlib import Path
from mgm_exp.search.journal import StudyJournal
journal = StudyJournal(Path(sys.argv[1]))
number = 0
while True:
    journal.append_logs([{"writer": sys.argv[2], "n": number, "padding": "x" * 3000}])
    print(number, flush=True)
    number += 1
"""


def test_writers_that_are_killed_at_random_lose_nothing_and_block_nobody(tmp_path: Path) -> None:
    path, chance = tmp_path / "j", random.Random(0)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    promised: dict[str, int] = {}
    writers: dict[str, subprocess.Popen[str]] = {}

    def start(name: str) -> None:
        writers[name] = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), name], stdout=subprocess.PIPE, text=True, env=environment
        )

    def end(name: str) -> None:
        process = writers.pop(name)
        os.kill(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        promised[name] = max((int(line) for line in output.splitlines()), default=-1)

    names = iter(f"w{number}" for number in range(100))
    for _ in range(2):
        start(next(names))
    for _ in range(4):
        current = list(writers)
        for name in current:
            assert writers[name].stdout is not None
            writers[name].stdout.readline()  # it has begun
        time.sleep(chance.random() * 0.05)
        end(chance.choice(current))
        start(next(names))
    for name in list(writers):
        end(name)
    found: dict[str, list[int]] = {}
    for row in records(path):
        found.setdefault(row["writer"], []).append(row["n"])
    for name, last in promised.items():
        rows = found.get(name, [])
        assert rows == list(range(len(rows))), name
        assert len(rows) >= last + 1, name
