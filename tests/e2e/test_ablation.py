"""The ablation of the front page: data x adapter, stages shared, one table, and the same command again."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from .command_line import Command, read, steps

GRID = ["-m", "data=raw,blip2", "adapter=full,lora_r8,lora_r16"]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Command, Path, str]:
    command = Command(tmp_path_factory.mktemp("grid") / "outputs")
    done = command.run(*GRID)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-3000:]
    (folder,) = (command.root / "sweeps").iterdir()
    return command, folder, done.stdout


def test_six_runs_take_two_aligns(sweep: tuple[Command, Path, str]) -> None:
    _, folder, _ = sweep
    record = read(folder / "sweep.json")
    assert [trial["status"] for trial in record["trials"]] == ["completed"] * 6
    assert [trial["run_dir"] for trial in record["trials"]] == [str(n) for n in range(6)]
    made = {"align": 0, "instruct": 0, "curate": 0}
    for trial in record["trials"]:
        for stage in read(folder / trial["run_dir"] / "manifest.json")["stages"]:
            if stage["name"] in made and not stage["reused"]:
                made[stage["name"]] += 1
    assert made == {"align": 2, "instruct": 6, "curate": 2}
    assert record["best"]["value"] == max(trial["metrics"]["demo/accuracy"] for trial in record["trials"])


def test_different_cells_have_different_weights_and_every_run_has_all_steps(sweep: tuple[Command, Path, str]) -> None:
    _, folder, _ = sweep
    digests = set()
    for number in range(6):
        run = folder / str(number)
        (weights,) = [*(run / "adapter").glob("adapter_model.safetensors"), *(run / "model").glob("model.safetensors")]
        digests.add(hashlib.sha256(weights.read_bytes()).hexdigest())
        assert steps(run) == [("align", 1), ("align", 2), ("instruct", 1), ("instruct", 2), ("instruct", 3)]
    assert len(digests) == 6


def test_the_table_names_what_differs_and_the_comparison_is_written(sweep: tuple[Command, Path, str]) -> None:
    _, folder, output = sweep
    for text in ("lora_r16", "full", "blip2", "question only"):
        assert text in output
    comparison = read(folder / "comparison.json")
    assert len(comparison["runs"]) == 6
    assert len(comparison["pairs"]) == 5
    assert {pair["verdict"] for pair in comparison["pairs"]} <= {"better", "worse", "tied"}


def test_the_same_command_again_runs_nothing(sweep: tuple[Command, Path, str]) -> None:
    command, folder, _ = sweep
    before = read(folder / "sweep.json")
    done = command.run(*GRID)
    assert done.returncode == 0, done.stderr[-2000:]
    assert read(folder / "sweep.json")["trials"] == before["trials"]
    assert [path.name for path in (command.root / "sweeps").iterdir()] == [folder.name]
