"""A search with rungs and the real components: paused trials are exact prefixes, the winner is bit for bit the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .command_line import Command, read, rows

POINTS = "[{train.lr: 1e-6}, {train.lr: 6e-3}, {train.lr: 2e-2}]"
SEARCH = [
    "-m", "hydra/sweeper=mgm_optuna", "train.lr=1e-6,6e-3,2e-2", f"sweep.enqueue={POINTS}", "sweep.n_trials=3",
    "sweep.name=s", "adapter=lora_r8", "adapter.dropout=0.1", "train.max_steps=4", "train.validation.every_steps=1",
    "train.validation.questions=8", "eval.max_questions=8", "eval.demo.split=val", "eval.demo.baselines=false",
]  # fmt: skip
# What a row says of the training, whatever the clock and the machine.
_TRAINED = ("event", "step", "epoch", "loss", "lr", "grad_norm", "batch_name", "tokens", "value")


def trained(run: Path) -> list[dict[str, Any]]:
    """The optimizer steps and scores of the instruct stage."""
    found = [row for row in rows(run / "metrics.jsonl") if row["stage"] == "instruct"]
    steps = [row for row in found if row.get("event") in (None, "validation")]
    return [{key: row[key] for key in _TRAINED if key in row} for row in steps]


def test_paused_trials_are_prefixes_and_the_winner_is_that_of_the_whole_search(tmp_path: Path) -> None:
    folders = {}
    for name, pruner in (
        ("rungs", ["sweep.pruner.name=rungs", "sweep.pruner.reduction_factor=2"]),
        ("whole", ["sweep.pruner.name=none"]),
    ):
        command = Command(tmp_path / name)
        done = command.run(*SEARCH, *pruner)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        folders[name] = command.root / "sweeps" / "s"
    climbed, whole = folders["rungs"], folders["whole"]
    record, other = read(climbed / "sweep.json"), read(whole / "sweep.json")
    assert sorted(trial["status"] for trial in record["trials"]) == ["completed", "pruned", "pruned"]
    assert record["rungs"] == {"reached": [[1, 3], [2, 1]], "steps": 6, "full_steps": 12}
    for trial in record["trials"]:
        mine, full = climbed / trial["run_dir"], whole / trial["run_dir"]
        for run in (mine, full):
            stages = {stage["name"]: stage["reused"] for stage in read(run / "manifest.json")["stages"]}
            assert not stages.get("instruct"), "both were really trained"
        assert trained(mine) == trained(full)[: len(trained(mine))], "an exact prefix"
        assert read(mine / "result.json")["status"] == trial["status"]
    best = record["best"]["number"]
    assert other["trials"][best]["values"] == record["trials"][best]["values"]
    mine, full = climbed / str(best), whole / str(best)
    assert len(trained(mine)) == len(trained(full)) == 4 + 3, "four steps and the scores between them"
    for file in ("adapter/adapter_model.safetensors", "predictions/demo.jsonl"):
        assert (mine / file).read_bytes() == (full / file).read_bytes(), file
    resumed = [row["step"] for row in rows(mine / "metrics.jsonl") if row.get("event") == "resumed"]
    assert resumed == [1, 2], "it was paused twice"
    assert read(mine / "result.json")["steps"] == 4 and (climbed / "rungs.svg").is_file()
    assert json.loads((climbed / "comparison.json").read_text())["runs"]
