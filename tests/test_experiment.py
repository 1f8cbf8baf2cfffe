"""What a run is called, and what it says of its end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mgm_exp import experiment
from mgm_exp.config import ExperimentConfig
from mgm_exp.errors import DiskFullError
from mgm_exp.experiment import Experiment


def test_a_run_keeps_its_id_and_the_same_run_elsewhere_has_another(
    compose: Callable[..., ExperimentConfig], tmp_path: Path
) -> None:
    """W&B would write two runs of one id into one."""

    def manifest(folder: str, *overrides: str) -> dict[str, object]:
        run_dir = tmp_path / folder / "ranks" / "3"
        run_dir.mkdir(parents=True, exist_ok=True)
        config = compose(f"paths.root={tmp_path / folder}", *overrides)
        return Experiment(config, run_dir, command=[], overrides=[], sweep="ranks").manifest

    first = manifest("one")
    assert str(first["run_id"]).startswith("ranks-3-")
    (tmp_path / "one" / "ranks" / "3" / "manifest.json").write_text(json.dumps(first))
    assert manifest("one")["run_id"] == first["run_id"]
    assert manifest("two")["run_id"] != first["run_id"]
    assert manifest("one", "seed=7")["run_id"] != first["run_id"]


def test_a_full_disk_is_told_by_what_it_ended_not_by_the_record_that_finds_no_room_either(
    compose: Callable[..., ExperimentConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(what: str) -> None:
        raise DiskFullError(f"No space is left to write {what}")

    monkeypatch.setattr(experiment, "write_json_atomic", lambda path, content: full(path.name))
    monkeypatch.setattr(Experiment, "story", lambda self: full("step-000010"))
    run = Experiment(compose(f"paths.root={tmp_path}"), tmp_path, command=[], overrides=[], sweep=None)
    with pytest.raises(DiskFullError, match="step-000010"):
        run.run()
    assert "manifest.json" in caplog.text
