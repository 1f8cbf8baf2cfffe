"""What a run ran on is told without secrets, and without touching the GPU."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from mgm_exp.record import collect_environment, environment


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small repository with one commit."""

    def git(*command: str) -> None:
        subprocess.run(
            ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *command], cwd=tmp_path, check=True
        )

    git("init", "-q")
    (tmp_path / "code.py").write_text("a = 1\n")
    git("add", "code.py")
    git("commit", "-q", "-m", "first")
    return tmp_path


def test_the_environment_is_plain_json_with_the_manifests_keys() -> None:
    found = collect_environment()
    assert set(found) == {"git", "packages", "python", "platform", "device"}
    assert json.loads(json.dumps(found)) == found
    assert found["packages"]["torch"].startswith("2.")
    assert found["device"]["type"] in ("cpu", "cuda")
    assert found["device"]["threads"] >= 1
    assert found["device"]["cpu_capability"]


def test_git_is_asked_once_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    first = collect_environment()["git"]
    monkeypatch.setattr(environment, "git_state", lambda root: pytest.fail("it is asked again"))
    again = collect_environment()["git"]
    assert again == first and again is not first


def test_a_clean_checkout_has_no_diff(checkout: Path) -> None:
    state = environment.git_state(checkout)
    assert len(state["commit"]) == 40
    assert (state["dirty"], state["diff"]) == (False, "")


def test_a_changed_checkout_shows_what_changed_without_secrets(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-88bb")
    (checkout / "code.py").write_text("a = 'canary-88bb'\n")
    state = environment.git_state(checkout)
    assert state["dirty"] is True
    assert "+a = '***'" in state["diff"]


def test_a_large_diff_is_cut(checkout: Path) -> None:
    (checkout / "code.py").write_text("x\n" * environment.DIFF_LIMIT)
    assert len(environment.git_state(checkout)["diff"]) < environment.DIFF_LIMIT + 100


def test_an_installed_package_has_no_git_state(tmp_path: Path) -> None:
    assert environment.git_state(tmp_path) == {"commit": None, "dirty": None, "diff": None}


def test_gpus_are_read_from_the_drivers_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    listing = "NVIDIA H100 80GB HBM3, 81559, 550.54\nNVIDIA H100 80GB HBM3, 81559, 550.54\n"
    monkeypatch.setattr(environment.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(environment, "_run", lambda command, folder: listing)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert environment._gpus() == [["NVIDIA H100 80GB HBM3", "81559", "550.54"]] * 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert len(environment._gpus()) == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert environment._gpus() == []
