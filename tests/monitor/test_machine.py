"""What is read of the machine, and of a GPU's driver."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mgm_exp.monitor import gpus, machine
from mgm_exp.monitor.gpus import Gpus, open_gpus
from mgm_exp.monitor.machine import Machine

ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it reads /proc")


@ON_LINUX
def test_a_sample_says_what_the_machine_has_and_rates_come_with_the_second(tmp_path: Path) -> None:
    watched = Machine({"root": tmp_path / "not" / "made" / "yet"})
    first = watched.sample(1000.0)
    end = time.process_time() + 0.2
    while time.process_time() < end:  # work, for processors to show
        pass
    second = watched.sample(1000.2)
    assert set(first) == {"t", "memory_gib", "memory_total_gib", "process_memory_gib", "disks"}
    assert set(second) == {*first, "cpu", "process_cpu", "network"}
    assert 0 < first["process_memory_gib"] < first["memory_gib"] < first["memory_total_gib"]
    assert 0 <= second["cpu"] <= 1
    assert 0.5 < second["process_cpu"] < 3
    assert 0 < first["disks"]["root"]["free_gib"] <= first["disks"]["root"]["total_gib"]


@ON_LINUX
@pytest.mark.parametrize("has_children_files", [True, False])
def test_the_memory_of_children_counts(has_children_files: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    child = subprocess.Popen([sys.executable, "-S", "-c", "b = b'x' * 50_000_000; print(1, flush=True); input()"],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    try:
        assert child.stdout is not None
        child.stdout.read(1)
        watched = Machine({}, pid=os.getpid())
        monkeypatch.setattr(watched, "_has_children_files", has_children_files)
        with_child = watched.sample(0.0)["process_memory_gib"]
    finally:
        child.communicate(b"\n")
    assert with_child - watched.sample(1.0)["process_memory_gib"] > 0.04


def test_a_disk_of_which_nothing_is_known_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> Any:
        raise OSError("stale file handle")

    monkeypatch.setattr(machine.os, "statvfs", refuse)
    assert Machine({"root": Path("/")}).sample(0.0)["disks"] == {}


# -- GPUs: a driver's library with two cards of its own -------------------------------------------------------------


class NotSupported(Exception):
    pass


class Library:
    """Two GPUs of 80 GiB; the second one does not tell its use."""

    NVMLError = NotSupported
    NVML_TEMPERATURE_GPU = 0

    def __init__(self) -> None:
        self.is_open = False

    def nvmlInit(self) -> None:
        self.is_open = True

    def nvmlShutdown(self) -> None:
        self.is_open = False

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index > 1:
            raise NotSupported("Invalid Argument")
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return {"GPU-aa": 0, "MIG-bb": 1}[uuid]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(used=(handle + 1) * 2**30, total=80 * 2**30)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:
        if handle:
            raise NotSupported("Not Supported")
        return SimpleNamespace(gpu=37)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return 412_345

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        return 61


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Library:
    found = Library()
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(gpus, "_DRIVER", (str(tmp_path / "nvidiactl"),))
    monkeypatch.setitem(sys.modules, "pynvml", found)
    monkeypatch.setattr(gpus.importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return found


def opened(devices: int) -> Gpus:
    found, why_not = open_gpus(devices)
    assert found is not None and why_not is None
    return found


def test_a_sample_of_gpus_has_null_for_what_one_does_not_tell(library: Library) -> None:
    first, second = opened(2).sample()
    assert first == {
        "index": 0,
        "memory_used_gib": 1.0,
        "memory_total_gib": 80.0,
        "utilization": 0.37,
        "power_w": 412.3,
        "temperature_c": 61,
    }
    assert (second["index"], second["memory_used_gib"], second["utilization"]) == (1, 2.0, None)


def test_a_gpu_without_memory_of_its_own_is_sampled_all_the_same(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(handle: int) -> SimpleNamespace:
        raise NotSupported("Not Supported")

    monkeypatch.setattr(library, "nvmlDeviceGetMemoryInfo", refuse)
    (gpu,) = opened(1).sample()
    assert (gpu["memory_used_gib"], gpu["memory_total_gib"], gpu["utilization"]) == (None, None, 0.37)


@pytest.mark.parametrize(
    ("visible", "devices", "used"),
    [
        (None, 1, [1.0]),
        (None, 8, [1.0, 2.0]),
        ("1", 1, [2.0]),
        ("1,7", 1, [2.0]),
        ("1,0", 2, [2.0, 1.0]),
        ("MIG-bb", 1, [2.0]),
    ],
)
def test_a_run_watches_the_gpus_that_it_takes(
    visible: str | None, devices: int, used: list[float], library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu["memory_used_gib"] for gpu in opened(devices).sample()] == used


def test_no_driver_no_gpu_and_nothing_to_say(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "_DRIVER", ("/nothing/here",))
    assert open_gpus(1) == (None, None)


def test_hidden_gpus_are_not_looked_at(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert open_gpus(1) == (None, None)
    assert not library.is_open


def test_gpus_that_cannot_be_read_are_said_so(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    none, why = open_gpus(1)
    assert none is None and why is not None and "Invalid Argument" in why
    assert not library.is_open
    monkeypatch.setattr(gpus.importlib.util, "find_spec", lambda name: None)
    none, why = open_gpus(1)
    assert none is None and why is not None and "mgm-exp[monitor]" in why
