"""How trials are handed to the processes of packs, and what becomes of them when one dies."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mgm_exp.config import ExperimentConfig
from mgm_exp.errors import ConfigError
from mgm_exp.packed.settings import settings_of
from mgm_exp.packed.slots import PackedSlots, packed_slots
from mgm_exp.slots import Work, own_program

# Ends each run as its override says: with an exit code, by killing the process, or when it is asked to stop.
PROCESS = """
import json, os, signal, sys, time
orders = json.load(sys.stdin)
with open(os.environ["PACKS"], "a") as file:
    file.write(json.dumps([order["number"] for order in orders]) + "\\n")
print("a line of the process", flush=True)
print("pack: so many train together", flush=True)
waits = []
signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
for order in orders:
    how = order["arguments"][0]
    if how in ("wait", "starts"):
        waits.append(order)
        if how == "starts":  # it does not hear yet
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    elif how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        os.write(int(sys.argv[1]), json.dumps({"number": order["number"], "exit_code": int(how)}).encode() + b"\\n")
if waits:
    open(os.environ["PACKS"] + ".waiting", "w").close()
    time.sleep(60)
"""


class Packs:
    """Slots over the program above."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, trials: int, places: int = 1) -> None:
        self.folder, self.log = folder, folder / "packs"
        monkeypatch.setenv("PACKS", str(self.log))
        self.slots = PackedSlots([[]] * places, own_program(), trials, [sys.executable, "-c", PROCESS])

    def start(self, *hows: str) -> None:
        for number, how in enumerate(hows):
            self.slots.start(Work(number, self.folder / str(number), (how,)))

    def until_ended(self) -> dict[int, int | None]:
        found: dict[int, int | None] = {}
        while self.slots.busy:
            found |= {work.number: ending.exit_code for work, ending in self.slots.ended(1.0)}
        return found

    def made(self) -> list[list[int]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


def test_trials_that_come_together_are_one_pack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    packs = Packs(tmp_path, monkeypatch, trials=2)
    packs.start("0", "1", "2")
    assert packs.slots.busy == 3
    assert packs.until_ended() == {0: 0, 1: 1, 2: 2}
    assert packs.made() == [[0, 1], [2]]
    assert (tmp_path / "0" / "pack.txt").read_text().startswith("a line of the process\n")
    assert capsys.readouterr().out == "pack: so many train together\n" * 2


def test_two_places_get_equal_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packs = Packs(tmp_path, monkeypatch, trials=3, places=2)
    assert packs.slots.size == 6
    packs.start("0", "0", "0", "0")
    packs.until_ended()
    assert sorted(packs.made()) == [[0, 1], [2, 3]]


def test_a_trial_that_kills_its_process_ends_alone_and_the_others_do_not_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packs = Packs(tmp_path, monkeypatch, trials=4)
    packs.start("0", "kill", "0", "0")
    assert packs.until_ended() == {0: 0, 1: -signal.SIGKILL, 2: 0, 3: 0}
    assert packs.made() == [[0, 1, 2, 3], [1, 2], [3], [1], [2]]


@pytest.mark.parametrize("how", ["wait", "starts"])
def test_a_stop_asks_the_process_and_gives_back_what_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    packs = Packs(tmp_path, monkeypatch, trials=2)
    packs.start(how, how, "0")
    deadline = time.monotonic() + 30
    while not (tmp_path / "packs.waiting").exists():
        assert time.monotonic() < deadline
        packs.slots.ended(0.05)
    ended = packs.slots.stop()
    assert sorted((work.number, ending.exit_code) for work, ending in ended) == [(0, 130), (1, 130), (2, 130)]
    assert packs.slots.busy == 0
    assert "go on from their checkpoints" not in capsys.readouterr().out


def test_what_the_launcher_takes(compose: Callable[..., ExperimentConfig]) -> None:
    def slots(launcher: dict[str, Any], *overrides: str) -> PackedSlots:
        return packed_slots(settings_of(launcher), compose("device=cpu", *overrides), own_program())

    assert slots({}).size == 8
    assert slots({"trials": 3, "packs": 2}).size == 6
    assert slots({}, "sweep.slots=4").size == 4
    for launcher, overrides, told in (
        ({"trials": 3}, ["sweep.slots=4"], "say different things"),
        ({}, ["sweep.isolate=true"], "isolate"),
        ({}, ["launch.wait=false"], "slurm"),
    ):
        with pytest.raises(ConfigError, match=told):
            slots(launcher, *overrides)
    for wrong in ({"trials": 0}, {"packs": 0}, {"trials": "many"}, {"slots": 2}):
        with pytest.raises(ConfigError):
            settings_of(wrong)
    with pytest.raises(ConfigError, match="this package only"):
        packed_slots(settings_of({}), compose("device=cpu"), [sys.executable, "other.py"])
