"""What a run is called."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from mgm_exp.config import ExperimentConfig
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
