"""The ready-made search with the real components: pruned, killed at random instants, and the same in the end."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from .command_line import Command, read, rows

SEARCH = [
    "-m", "+sweeps=lora_search", "train.max_steps=6", "train.validation.every_steps=2", "train.validation.questions=8",
    "train.checkpoint.every_steps=2", "sweep.pruner.min_step=null", "sweep.sampler.startup=2", "eval.max_questions=16",
]  # fmt: skip


def summary(folder: Path) -> list[Any]:
    return [
        (trial["number"], trial["status"], trial["params"], trial["values"])
        for trial in read(folder / "sweep.json")["trials"]
    ]


def only_sweep(command: Command) -> Path:
    (folder,) = (command.root / "sweeps").iterdir()
    return folder


def test_a_search_shares_stages_prunes_and_shows_its_trials(tmp_path: Path) -> None:
    command = Command(tmp_path / "outputs")
    done = command.run(*SEARCH, "sweep.n_trials=4", "sweep.sampler.seed=1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder = only_sweep(command)
    record = read(folder / "sweep.json")
    states = [trial["status"] for trial in record["trials"]]
    assert len(states) == 4 and set(states) <= {"completed", "pruned"} and states[0] == "completed"
    made = [
        stage["name"]
        for trial in record["trials"]
        for stage in read(folder / trial["run_dir"] / "manifest.json")["stages"]
        if not stage["reused"]
    ]
    assert made.count("align") == made.count("curate") == made.count("features") == 1, "shared by all trials"
    for trial in record["trials"]:
        run = folder / trial["run_dir"]
        points = [row for row in rows(run / "metrics.jsonl") if row.get("event") == "validation"]
        assert [row["step"] for row in points] == [row["step"] for row in rows(run / "reports.jsonl")]
        assert read(run / "result.json")["metrics"]["demo/validation"] == points[-1]["value"]
        if trial["status"] == "pruned":
            assert read(run / "result.json")["status"] == "pruned"
            assert list((run / "checkpoints" / "instruct").glob("step-*")), "its partial result is kept"
            assert points[-1]["step"] < 6
    assert f"best: trial {record['best']['number']}" in done.stdout
    default = record["trials"][0]["params"]
    assert (default["adapter.rank"], default["adapter.alpha"], default["train.lr"]) == (8, 16, 5e-3)
    again = command.run(*SEARCH, "sweep.n_trials=4", "sweep.sampler.seed=1")
    assert again.returncode == 0 and "trial 0:" not in again.stdout


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killed_at_ten_random_instants_it_ends_as_if_undisturbed(tmp_path: Path) -> None:
    """Exactly the asked number of trials, the same points, the same values, the same best: bit for bit."""
    arguments = [*SEARCH, "sweep.n_trials=12"]
    quiet = Command(tmp_path / "quiet" / "outputs")
    quiet.root.parent.mkdir()
    began = time.monotonic()
    done = quiet.run(*arguments)
    assert done.returncode == 0, done.stdout[-3000:]
    whole_s = time.monotonic() - began
    loud, chance, kills = Command(tmp_path / "loud" / "outputs"), random.Random(4), 0
    loud.root.parent.mkdir()
    while kills < 10:
        process = loud.start(*arguments)
        time.sleep(6 + chance.random() * whole_s / 8)
        assert process.poll() is None, "it was through before it was killed ten times"
        process.kill()
        process.communicate()
        kills += 1
    done = loud.run(*arguments)
    assert done.returncode == 0, done.stdout[-3000:]
    assert summary(only_sweep(loud)) == summary(only_sweep(quiet))
    best, other = (read(only_sweep(command) / "sweep.json")["best"] for command in (loud, quiet))
    assert best == other
