"""``hydra/launcher=local``: how many slots, which GPUs, and that one trial's crash is its own."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mgm_exp.config import Device, ExperimentConfig
from mgm_exp.errors import ConfigError
from mgm_exp.gpus import dealt, parse_listing, visible_gpus
from mgm_exp.local import LocalConfig, local_slots, settings_of

Compose = Callable[..., ExperimentConfig]
LISTING = """GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-11111111-aaaa-bbbb-cccc-000000000000)
  MIG 3g.20gb     Device  0: (UUID: MIG-22222222-aaaa-bbbb-cccc-000000000000)
  MIG 3g.20gb     Device  1: (UUID: MIG-33333333-aaaa-bbbb-cccc-000000000000)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-44444444-aaaa-bbbb-cccc-000000000000)
"""


@pytest.mark.parametrize(("given", "gpus"), [("0,2", ["0", "2"]), ("", []), ("-1", []), ("GPU-abc", ["GPU-abc"])])
def test_the_gpus_that_are_dealt_out(monkeypatch: pytest.MonkeyPatch, given: str, gpus: list[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert visible_gpus() == gpus


def test_gpus_are_named_as_nvidia_smi_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<END\n{LISTING}END\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == [
        "MIG-22222222-aaaa-bbbb-cccc-000000000000",
        "MIG-33333333-aaaa-bbbb-cccc-000000000000",
        "GPU-44444444-aaaa-bbbb-cccc-000000000000",
    ]
    assert parse_listing("No devices were found\n") == []


def test_no_gpu_has_two_slots_unless_they_may_share() -> None:
    assert dealt(["a", "b", "c", "d"], 2, 2, share=False) == [["a", "b"], ["c", "d"]]
    with pytest.raises(ConfigError, match=r"3 slots with devices=2 each need 6 GPUs, and there are 4.*sweep\.slots=2"):
        dealt(["a", "b", "c", "d"], 3, 2, share=False)
    assert dealt(["a", "b"], 3, 1, share=True) == [["a"], ["b"], ["a"]]
    assert dealt([], 3, 2, share=False) == [[], [], []]
    with pytest.raises(ConfigError, match="devices=2 is more than the 1 GPU"):
        dealt(["a"], 1, 2, share=True)
    with pytest.raises(ConfigError, match="only one of them"):
        dealt(["MIG-a", "MIG-b"], 1, 2, share=False)


def test_how_many_slots_there_are(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    assert local_slots(LocalConfig(), compose("devices=2"), ["x"]).size == 2
    assert local_slots(LocalConfig(), compose("sweep.slots=3"), ["x"]).size == 3
    assert local_slots(LocalConfig(slots=4), compose(), ["x"]).size == 4
    assert local_slots(LocalConfig(), compose("device=cpu"), ["x"]).size == 1
    assert local_slots(LocalConfig(), compose("device=cpu", "sweep.slots=7"), ["x"]).size == 7
    assert compose("device=cpu").device is Device.cpu
    with pytest.raises(ConfigError, match="mean the same; give one"):
        local_slots(LocalConfig(slots=2), compose("sweep.slots=3"), ["x"])
    with pytest.raises(ConfigError, match="several machines"):
        local_slots(LocalConfig(), compose("launch.hostfile=hosts"), ["x"])


@pytest.mark.parametrize(
    ("given", "says"),
    [({"slots": 0}, "slots=0"), ({"mem_gb": -1}, "mem_gb=-1"), ({"slots": "many"}, "many"), ({"slot": 2}, "slot")],
)
def test_settings_that_cannot_be_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=r"hydra\.launcher") as caught:
        settings_of(given)
    assert says in str(caught.value)


def test_a_grid_in_slots_of_its_own(app: Any) -> None:
    code = app(
        "-m",
        "hydra/launcher=local",
        "hydra.launcher.slots=2",
        "device=cpu",
        "sweep.retries=0",
        "adapter.rank=4,8,12",
        fail="8:killed",
    )
    sweep = app.sweep()
    states = {trial["params"]["adapter.rank"]: trial["status"] for trial in sweep["trials"]}
    assert code == 1
    assert [str(states[key]) for key in sorted(states, key=int)] == ["completed", "failed", "completed"]
    config = json.loads((app.sweep_dir / "0" / "config.yaml").read_text())
    assert config["launch"]["machines"] == "here"


def test_a_search_in_slots_of_its_own(app: Any) -> None:
    code = app(
        "-m", "hydra/launcher=local", "hydra/sweeper=mgm_optuna", "device=cpu", "sweep.slots=2", "sweep.n_trials=3",
        "adapter.rank=choice(1,2,3)", "sweep.pruner.name=none",
    )  # fmt: skip
    assert code == 0
    assert [trial["status"] for trial in app.sweep()["trials"]] == ["completed"] * 3
    assert app.sweep()["slots"] == 2


def test_a_misspelt_key_is_explained(app: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert app("-m", "hydra/launcher=local", "hydra.launcher.slot=2", "seed=0,1") == 2
    assert "slot" in capsys.readouterr().err


def test_workers_that_stay_do_a_grid(app: Any) -> None:
    code = app("-m", "hydra/launcher=warm", "device=cpu", "sweep.retries=0", "adapter.rank=4,8,12", fail="8:killed")
    states = {trial["params"]["adapter.rank"]: trial["status"] for trial in app.sweep()["trials"]}
    assert code == 1
    assert [str(states[key]) for key in sorted(states, key=int)] == ["completed", "failed", "completed"]
