"""Workers of a small program, and what they saw."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mgm_exp.search import Ending
from mgm_exp.slots import Slots, Work
from mgm_exp.warm.slots import WarmSlots

PROGRAM = Path(__file__).with_name("small_worker.py")


def work(folder: Path, number: int, what: str = "end") -> Work:
    return Work(number, folder / str(number), (f"what={what}",))


def collect(found: Slots, count: int) -> dict[int, Ending]:
    ended: dict[int, Ending] = {}
    deadline = time.monotonic() + 300
    while len(ended) < count:
        assert time.monotonic() < deadline
        ended |= {done.number: ending for done, ending in found.ended(1.0)}
    return ended


def seen(work: Work) -> dict[str, Any]:
    """What a run saw of its process."""
    return json.loads((work.run_dir / "seen.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


class Staff:
    """Slots with workers of the small program, and what was said about them."""

    def __init__(self, n: int = 1, **settings: Any) -> None:
        self.said: list[str] = []
        self.slots = WarmSlots([[]] * n, [sys.executable, str(PROGRAM)], say=self.said.append, **settings)

    def do(self, *works: Work) -> dict[int, Ending]:
        """One after another."""
        ended: dict[int, Ending] = {}
        for one in works:
            self.slots.start(one)
            ended |= collect(self.slots, 1)
        return ended


@pytest.fixture(autouse=True)
def _this_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PROGRAM.parents[2]), *inherited]))


@pytest.fixture
def staff() -> Iterator[Staff]:
    found = Staff()
    yield found
    found.slots.close()
