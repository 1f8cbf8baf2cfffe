"""``manifest.json`` and ``result.json`` keep their contract or are not written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mgm_exp.record import write_manifest, write_result

MANIFEST: dict[str, Any] = {
    "run_id": "demo-1",
    "config_hash": "abc",
    "command": ["python", "-m", "mgm_exp", "+tracker.api_key=canary"],
    "git": {"commit": None, "dirty": None, "diff": None},
    "packages": {"torch": "2.13.0"},
    "python": "3.11.7",
    "platform": "Linux",
    "device": {"type": "cpu"},
    "seed": 0,
    "stages": [{"name": "align", "key": "k", "reused": False, "seconds": 1.5}],
    "data": {"name": "raw", "fingerprint": "f", "n_train": 10},
    "model": {"name": "tiny", "fingerprint": "f", "n_parameters": 100},
    "trainable": {"n_lora": 3, "n_other": 4, "n_total": 7, "patterns": ["a.*"]},
    "started_at": "2026-01-01T00:00:00+00:00",
    "ended_at": None,
}
RESULT: dict[str, Any] = {
    "run_id": "demo-1",
    "status": "completed",
    "metrics": {"demo/accuracy": 0.5},
    "eval_keys": {},
    "objective": 0.5,
    "steps": 10,
    "wall_s": 1.0,
    "train_tokens_per_s": 10.0,
    "peak_memory_gib": 0.1,
    "trainable_parameters": 7,
    "error": None,
}


def test_the_manifest_is_written_with_its_schema_version_and_without_secrets(tmp_path: Path) -> None:
    written = write_manifest(tmp_path, MANIFEST)
    assert json.loads((tmp_path / "manifest.json").read_text()) == written
    assert written["schema_version"] == 1
    assert written["trainable"] == MANIFEST["trainable"]
    assert "canary" not in (tmp_path / "manifest.json").read_text()


@pytest.mark.parametrize("key", sorted(MANIFEST))
def test_a_manifest_without_one_of_its_keys_is_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=key):
        write_manifest(tmp_path, {name: value for name, value in MANIFEST.items() if name != key})
    assert not (tmp_path / "manifest.json").exists()


def test_trainable_parameters_have_to_add_up(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="n_total"):
        write_manifest(tmp_path, {**MANIFEST, "trainable": {**MANIFEST["trainable"], "n_total": 8}})


def test_the_result_is_strict_json_and_replaced_as_a_whole(tmp_path: Path) -> None:
    write_result(tmp_path, RESULT)
    written = write_result(tmp_path, {**RESULT, "status": "pruned", "peak_memory_gib": math.nan})
    read = json.loads((tmp_path / "result.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert read == written
    assert read["peak_memory_gib"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"status": "done"}, "allowed are"),
        ({"status": "failed"}, "type"),
        ({"status": "failed", "error": {"type": "X", "message": "m"}}, "cause"),
        ({"metrics": {"demo/accuracy": math.nan}}, "not finite"),
    ],
)
def test_a_result_that_says_too_little_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        write_result(tmp_path, {**RESULT, **change})
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize("key", sorted(RESULT))
def test_a_result_without_one_of_its_keys_is_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=key):
        write_result(tmp_path, {name: value for name, value in RESULT.items() if name != key})
