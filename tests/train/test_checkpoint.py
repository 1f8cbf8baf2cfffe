"""Checkpoints: whole or not there, the newest whole one is taken, and nothing is trained on under other settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mgm_exp.config import Device
from mgm_exp.errors import TrainingFailed
from mgm_exp.store import verify
from mgm_exp.train.checkpoint import Progress, load_newest, save_checkpoint
from mgm_exp.train.ranks import Ranks

from .test_engine import batch_of, engine_of, train, weights

ALONE = Ranks.alone(Device.cpu)
BELONGS: dict[str, Any] = {"stage": "instruct", "seed": 3}


def save_steps(root: Path, *steps: int, keep: int = 5) -> None:
    engine = engine_of()
    for step in range(1, max(steps) + 1):
        train(engine, [batch_of(8, step)], 8.0)
        if step in steps:
            save_checkpoint(root, engine, Progress(step=step, tokens=step * 10), BELONGS, ALONE, keep=keep)


def test_a_checkpoint_is_sealed_and_the_oldest_go(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, 3, 4, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000003", "step-000004"]
    assert verify(tmp_path / "step-000004") == []


def test_the_newest_one_restores_weights_and_progress(tmp_path: Path) -> None:
    save_steps(tmp_path, 2, 3)
    undisturbed = engine_of()
    for step in range(1, 4):
        train(undisturbed, [batch_of(8, step)], 8.0)
    engine = engine_of()
    progress, passed_over = load_newest(tmp_path, engine, BELONGS, ALONE)
    assert progress == Progress(step=3, tokens=30)
    assert passed_over == []
    assert all(torch.equal(weight, weights(undisturbed)[name]) for name, weight in weights(engine).items())


def test_an_empty_folder_means_the_beginning(tmp_path: Path) -> None:
    assert load_newest(tmp_path, engine_of(), BELONGS, ALONE) == (None, [])


@pytest.mark.parametrize("file", ["trainable.safetensors", "optimizer.safetensors", "state.json", "rng-0.json"])
@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
def test_a_damaged_one_is_named_and_passed_over(tmp_path: Path, file: str, damage: str) -> None:
    save_steps(tmp_path, 1, 2)
    path = tmp_path / "step-000002" / file
    raw = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw[:-1] if damage == "cut" else raw)
    progress, passed_over = load_newest(tmp_path, engine_of(), BELONGS, ALONE)
    assert progress is not None
    assert progress.step == 1
    assert len(passed_over) == 1
    assert "step-000002" in passed_over[0]
    assert file in passed_over[0]


def test_one_that_was_never_finished_is_not_taken(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    (tmp_path / "step-000002").rename(tmp_path / "step-000002.tmp")
    progress, passed_over = load_newest(tmp_path, engine_of(), BELONGS, ALONE)
    assert progress is not None
    assert progress.step == 1
    assert passed_over == []


def test_when_all_are_damaged_nothing_starts_over_silently(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    (tmp_path / "step-000001" / "state.json").write_text("{}")
    with pytest.raises(TrainingFailed, match=r"step-000001.*state\.json"):
        load_newest(tmp_path, engine_of(), BELONGS, ALONE)


def test_one_of_other_settings_is_refused_and_the_setting_named(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    with pytest.raises(TrainingFailed, match=r"seed=3 \(now 4\)"):
        load_newest(tmp_path, engine_of(), BELONGS | {"seed": 4}, ALONE)
