"""Faults that really happen in real runs: each is named in ``result.json``, and by ``mgm-exp doctor`` afterwards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mgm_exp.cli import main
from mgm_exp.command import run
from mgm_exp.errors import MgmError
from mgm_exp.preflight import TINY
from tests.recorded_run import overrides_for, write_data

pytestmark = pytest.mark.slow


def _model_without_end(folder: Path) -> Sequence[str]:
    shutil.copytree(TINY, folder / "model")
    (weights,) = sorted((folder / "model").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1000])
    return [f"model.path={folder / 'model'}"]


def _model_of_other_weights(folder: Path) -> Sequence[str]:
    shutil.copytree(TINY, folder / "model")
    config = json.loads((folder / "model" / "config.json").read_text())
    config["intermediate_size"] *= 2
    (folder / "model" / "config.json").write_text(json.dumps(config))
    return [f"model.path={folder / 'model'}"]


def _no_images(folder: Path) -> Sequence[str]:
    for image in (folder / "images").iterdir():
        if image.name != "0.png":
            image.unlink()
    return []


def _half_images(folder: Path) -> Sequence[str]:
    raw = (folder / "images" / "1.png").read_bytes()
    (folder / "images" / "1.png").write_bytes(raw[: len(raw) // 2])
    return ["data.bad_rows=fail"]


def _cut_rows(folder: Path) -> Sequence[str]:
    rows = (folder / "instruct.jsonl").read_text()
    (folder / "instruct.jsonl").write_text(rows[: len(rows) // 2])
    return ["data.bad_rows=fail"]


FAULTS: dict[str, tuple[Callable[[Path], Sequence[str]], tuple[str, ...]]] = {
    "a rate of a thousand million": (
        lambda folder: ["train.lr=1e9", "train.max_grad_norm=0", "train.max_steps=8", "train.warmup_ratio=0"],
        ("nan-rate-too-high", "loss-not-finite"),
    ),
    "weights that were cut off": (_model_without_end, ("weights-file-damaged",)),
    "a configuration of another size": (_model_of_other_weights, ("state-dict-mismatch",)),
    "images that are gone": (_no_images, ("too-many-bad-rows", "benchmark-files-missing")),
    "an image that was cut off": (_half_images, ("too-many-bad-rows", "image-damaged", "benchmark-files-missing")),
    "rows that were cut off": (_cut_rows, ("json-not-readable", "too-many-bad-rows", "format-not-known")),
    "a model that is not there": (lambda folder: ["model.path=/nowhere/at/all"], ("model-folder-missing",)),
}


@pytest.mark.parametrize("what", FAULTS)
def test_a_real_fault_is_named(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, allowed = FAULTS[what]
    write_data(tmp_path / "data", "a red sign")
    overrides = [*overrides_for(tmp_path / "data", tmp_path / "outputs"), *make(tmp_path / "data")]
    with pytest.raises(MgmError):
        run(overrides)
    (result,) = (tmp_path / "outputs" / "runs" / "recorded").glob("*/result.json")
    error = json.loads(result.read_text())["error"]
    assert error["doctor"]["id"] in allowed, error
    assert "doctor: " in (result.parent / "log.txt").read_text()
    capsys.readouterr()
    assert main(["doctor", str(result.parent)]) == 1
    assert error["doctor"]["title"] in capsys.readouterr().out
