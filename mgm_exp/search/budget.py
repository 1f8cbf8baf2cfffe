"""When a search is over: enough trials, no time left, nothing better found any more."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mgm_exp.config import Direction, SweepConfig
from mgm_exp.store import read_record, write_json_atomic

FOLDER = ".sweepers"
_SAVE_EVERY_S = 5.0


class Clock:
    """How long sweepers have worked on a sweep, all calls together, also those that were killed.

    Each sweeper keeps a file of its own and rewrites it every few seconds; what is lost by a kill is less than that.

    Args:
        folder: The sweep's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / FOLDER
        self._path = self._folder / f"clock-{uuid.uuid4().hex[:12]}.json"
        self._before_hours, self._before_gpu_hours = self._sum()
        self._seconds = self._gpu_seconds = 0.0
        self._last = self._saved = time.monotonic()

    def _sum(self) -> tuple[float, float]:
        hours = gpu_hours = 0.0
        for path in self._folder.glob("clock-*.json"):
            try:
                row = read_record(path)
                hours += float(row["seconds"]) / 3600
                gpu_hours += float(row["gpu_seconds"]) / 3600
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return hours, gpu_hours

    def tick(self, devices: int, *, save: bool = False) -> None:
        """Time has passed with so many devices in use."""
        now = time.monotonic()
        self._seconds += now - self._last
        self._gpu_seconds += (now - self._last) * devices
        self._last = now
        if save or now - self._saved >= _SAVE_EVERY_S:
            self._saved = now
            self._folder.mkdir(parents=True, exist_ok=True)
            write_json_atomic(self._path, {"seconds": self._seconds, "gpu_seconds": self._gpu_seconds})

    @property
    def hours(self) -> float:
        """Hours of all calls."""
        return self._before_hours + self._seconds / 3600

    @property
    def gpu_hours(self) -> float:
        """Hours x devices of all calls."""
        return self._before_gpu_hours + self._gpu_seconds / 3600


@dataclass(frozen=True)
class Budget:
    """The limits of a search.

    Args:
        trials: In all.
        hours, gpu_hours: Of all calls together.
        plateau: Completed trials in a row without a better one.
        min_delta: What counts as better.
    """

    trials: int
    hours: float | None = None
    gpu_hours: float | None = None
    plateau: int | None = None
    min_delta: float = 0.0

    @classmethod
    def of(cls, sweep: SweepConfig) -> Budget:
        """As ``sweep.n_trials``, ``sweep.budget`` and ``sweep.plateau`` say."""
        trials = sweep.n_trials if sweep.budget.trials is None else min(sweep.n_trials, sweep.budget.trials)
        return cls(trials, sweep.budget.hours, sweep.budget.gpu_hours, sweep.plateau.trials, sweep.plateau.min_delta)

    def is_spent(self, clock: Clock, values: Sequence[float], direction: Direction) -> str:
        """Why no further trial is started; empty where nothing speaks against one.

        Args:
            values: Of the completed trials, in the order in which they ended.
        """
        if self.hours is not None and clock.hours >= self.hours:
            return f"sweep.budget.hours={self.hours:g} are used up"
        if self.gpu_hours is not None and clock.gpu_hours >= self.gpu_hours:
            return f"sweep.budget.gpu_hours={self.gpu_hours:g} are used up"
        if self.plateau is not None and since_better(values, direction, self.min_delta) >= self.plateau:
            return f"the last {self.plateau} completed trials brought nothing better (sweep.plateau.trials)"
        return ""


def since_better(values: Sequence[float], direction: Direction, min_delta: float) -> int:
    """How many values in a row, up to the last one, did not improve on the best before them."""
    sign = 1.0 if direction is Direction.maximize else -1.0
    best, count = float("-inf"), 0
    for value in values:
        if sign * value > best + (min_delta if best > float("-inf") else 0.0):
            best, count = sign * value, 0
        else:
            count += 1
    return count
