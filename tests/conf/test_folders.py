"""Where a run writes, and which unfinished run a command continues."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mgm_exp.config import ExperimentConfig, plain
from mgm_exp.errors import ConfigError
from mgm_exp.folders import LEASE, confined, run_folder, wait_until_free
from mgm_exp.stages import config_hash
from mgm_exp.store import Lease

Compose = Callable[..., ExperimentConfig]


@pytest.fixture
def config(compose: Compose, tmp_path: Path) -> ExperimentConfig:
    return compose(f"paths.root={tmp_path}/out")


def leave(folder: Path, config: ExperimentConfig, status: str | None) -> Path:
    """A run's folder as a run of ``config`` leaves it that ended with ``status`` (None: it was killed)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps({"config_hash": config_hash(config)}), encoding="utf-8")
    if status is not None:
        (folder / "result.json").write_text(json.dumps({"status": status}), encoding="utf-8")
    return folder


def test_a_new_run_gets_a_folder_of_its_own_by_name_and_time(config: ExperimentConfig, tmp_path: Path) -> None:
    first, second = run_folder(config), run_folder(config)
    assert first.is_dir() and second.is_dir() and first != second
    assert first.parent == second.parent == (tmp_path / "out" / "runs" / "tiny-raw-lora_r8").resolve()


@pytest.mark.parametrize("status", [None, "interrupted", "failed"])
def test_an_unfinished_run_of_the_same_configuration_is_continued(config: ExperimentConfig, status: str | None) -> None:
    folder = leave(run_folder(config), config, status)
    assert run_folder(config) == folder


@pytest.mark.parametrize("status", ["completed", "pruned"])
def test_a_finished_run_is_left_alone(config: ExperimentConfig, status: str) -> None:
    folder = leave(run_folder(config), config, status)
    assert run_folder(config) != folder


def test_the_newest_run_decides(config: ExperimentConfig) -> None:
    parent = run_folder(config).parent
    leave(parent / "2020-01-01_00-00-00", config, "interrupted")
    newer = leave(parent / "2021-01-01_00-00-00", config, "failed")
    assert run_folder(config) == newer
    leave(newer, config, "completed")
    assert run_folder(config) not in (newer, parent / "2020-01-01_00-00-00")


def test_another_configuration_of_the_same_name_is_not_continued(
    config: ExperimentConfig, compose: Compose, tmp_path: Path
) -> None:
    folder = leave(run_folder(config), config, "interrupted")
    other = compose(f"paths.root={tmp_path}/out", "seed=1")
    assert other.name == config.name
    assert run_folder(other) != folder
    assert run_folder(config) == folder


def test_what_does_not_define_the_experiment_does_not_keep_it_from_being_continued(
    config: ExperimentConfig, compose: Compose, tmp_path: Path
) -> None:
    folder = leave(run_folder(config), config, "interrupted")
    same = compose(f"paths.root={tmp_path}/out", "tracker=disabled", "train.checkpoint.every_steps=7")
    assert run_folder(same) == folder


def test_a_run_that_is_being_written_is_passed_over(config: ExperimentConfig) -> None:
    folder = leave(run_folder(config), config, None)
    with Lease(folder / LEASE):
        assert run_folder(config) != folder
    assert run_folder(config) == folder


def test_a_run_killed_before_its_manifest_is_known_by_its_configuration(config: ExperimentConfig) -> None:
    folder = run_folder(config)
    assert run_folder(config) != folder, "an empty folder may be that of a command that is just starting"
    (folder / "config.yaml").write_text(yaml.safe_dump(plain(config)), encoding="utf-8")
    assert run_folder(config) == folder


@pytest.mark.parametrize("damage", ["", "{", "[1]", "\x00"])
def test_a_damaged_record_is_not_taken_for_a_run(config: ExperimentConfig, damage: str) -> None:
    folder = run_folder(config)
    (folder / "manifest.json").write_text(damage, encoding="utf-8")
    (folder / "config.yaml").write_text(damage, encoding="utf-8")
    assert run_folder(config) != folder


def test_a_link_is_not_followed_out_of_the_root(config: ExperimentConfig, tmp_path: Path) -> None:
    outside = leave(tmp_path / "outside", config, "interrupted")
    parent = tmp_path / "out" / "runs" / config.name
    parent.mkdir(parents=True)
    (parent / "9999-01-01_00-00-00").symlink_to(outside)
    assert run_folder(config).resolve().is_relative_to((tmp_path / "out").resolve())
    other = tmp_path / "out" / "runs" / "linked"
    other.symlink_to(tmp_path / "outside")
    config.name = "linked"
    with pytest.raises(ConfigError, match=r"outside of paths\.root"):
        run_folder(config)


@pytest.mark.parametrize("path", ["..", "../other", "a/../../x", "/etc", "."])
def test_a_path_outside_of_the_root_is_refused(path: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises(ConfigError):
        confined(root / path, root, "hydra.run.dir")
    assert confined(root / "a" / "b", root, "hydra.run.dir") == (root / "a" / "b").resolve()


def test_a_root_that_cannot_be_made_is_named(compose: Compose, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    config: Any = compose(f"paths.root={tmp_path}/file/below")
    with pytest.raises(ConfigError, match=r"paths\.root"):
        run_folder(config)


def test_a_folder_is_waited_for_until_its_killed_owner_is_gone(tmp_path: Path) -> None:
    code = (
        "import sys, time; from mgm_exp.store import Lease; lease = Lease(sys.argv[1]); lease.acquire(); "
        "print('ready', flush=True); time.sleep(600)"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / LEASE)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    assert owner.stdout is not None and owner.stdout.readline() == "ready\n"
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        owner.kill()
        owner.wait()

    wait_until_free(tmp_path, say)
    assert owner.returncode == -signal.SIGKILL
    assert str(owner.pid) in said[0]
    assert Lease(tmp_path / LEASE).holder() is None
    wait_until_free(tmp_path / "nothing_here", say)
    assert len(said) == 1
