"""Checkpoints: whole or not there, the newest whole one is taken, and nothing is trained on under other settings."""

from __future__ import annotations

import errno
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from mgm_exp.config import Device
from mgm_exp.errors import DiskFullError, TrainingFailed
from mgm_exp.store import verify
from mgm_exp.train.checkpoint import Progress, Saver, load_newest
from mgm_exp.train.engine import Snapshot
from mgm_exp.train.ranks import Ranks
from tests.fault_table import met

from .test_engine import batch_of, engine_of, train, weights

ALONE = Ranks.alone(Device.cpu)
BELONGS: dict[str, Any] = {"stage": "instruct", "seed": 3}


def save_steps(root: Path, *steps: int, keep: int = 5) -> None:
    engine = engine_of()
    saver = Saver(root, engine, BELONGS, ALONE, keep=keep)
    for step in range(1, max(steps) + 1):
        train(engine, [batch_of(8, step)], 8.0)
        if step in steps:
            saver.save(Progress(step=step, tokens=step * 10))


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
    met("damage", 1)


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


# -- which ones stay, and room for them --------------------------------------------------------------------------------


def test_the_best_ones_stay_besides_the_newest(tmp_path: Path) -> None:
    engine, progress = engine_of(), Progress()
    saver = Saver(tmp_path, engine, BELONGS, ALONE, keep=1)
    kept = []
    for step, score in enumerate([0.1, 0.5, 0.5, 0.3, 0.2], start=1):
        train(engine, [batch_of(8, step)], 8.0)
        progress.step = step
        kept.append(progress.is_among_best(score, 1))
        saver.save(progress)
    assert kept == [True, True, False, False, False]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000005"]
    found, _ = load_newest(tmp_path, engine_of(), BELONGS, ALONE)
    assert found is not None
    assert found.best == [[2, 0.5]], "a stage that is continued knows what it has to beat"


def test_room_is_looked_for_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    engine = engine_of()
    train(engine, [batch_of(8)], 8.0)
    assert engine.bytes_to_save() == 3 * 4 * 49
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(DiskFullError, match=r"no room in .*1,048,576 bytes are free.*last checkpoint is as it was"):
        Saver(tmp_path, engine, BELONGS, ALONE, keep=5).save(Progress(step=2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


@pytest.mark.parametrize("in_background", [False, True])
def test_a_disk_that_fills_up_meanwhile_leaves_the_last_good_one_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_background: bool
) -> None:
    save_steps(tmp_path, 1)
    engine = engine_of()
    train(engine, [batch_of(8)], 8.0)

    def full(self: Snapshot, folder: Path) -> None:
        (folder / "trainable.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Snapshot, "write", full)
    saver = Saver(tmp_path, engine, BELONGS, ALONE, keep=5, in_background=in_background)
    with pytest.raises(DiskFullError):
        saver.save(Progress(step=2))
        saver.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert verify(tmp_path / "step-000001") == []
    met("full", 1)


# -- in the background -------------------------------------------------------------------------------------------------


def test_what_is_written_in_the_background_is_the_state_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(tmp_path / "here", 1, 2)
    may_write = threading.Event()
    write = Snapshot.write
    monkeypatch.setattr(Snapshot, "write", lambda self, folder: (may_write.wait(60), write(self, folder))[1])
    engine, done = engine_of(), []
    saver = Saver(tmp_path / "there", engine, BELONGS, ALONE, keep=5, in_background=True, on_done=done.append)
    train(engine, [batch_of(8, 1)], 8.0)
    saver.save(Progress(step=1, tokens=10))
    train(engine, [batch_of(8, 2)], 8.0)  # while the first one waits
    saver.look()
    assert done == []
    may_write.set()
    saver.save(Progress(step=2, tokens=20))  # waits for the first one
    assert [path.name for path in done] == ["step-000001"]
    saver.finish()
    assert [path.name for path in done] == ["step-000001", "step-000002"]
    for name in ("step-000001", "step-000002"):
        for file in ("trainable.safetensors", "optimizer.safetensors"):
            assert (tmp_path / "here" / name / file).read_bytes() == (tmp_path / "there" / name / file).read_bytes()


def test_an_error_of_the_writer_is_raised_by_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Snapshot, folder: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr(Snapshot, "write", broken)
    saver = Saver(tmp_path, engine_of(), BELONGS, ALONE, keep=5, in_background=True)
    saver.save(Progress(step=1))
    assert saver._thread is not None
    saver._thread.join()
    with pytest.raises(PermissionError):
        saver.look()
    saver.look()
    saver.close()
