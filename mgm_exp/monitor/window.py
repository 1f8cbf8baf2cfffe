"""What a rule looks at: the last steps of the stage that trains, the last samples of the machine, the time.

Times are seconds of one clock, ``time.time`` in a run; nothing here reads a clock.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mgm_exp.config import MonitorLimitsConfig

Row = Mapping[str, Any]

# A step is a spike beside so many steps before it, once there are so many.
SPIKE_WINDOW = 50
SPIKE_LEAST = 10
# And the loss must stand out of its own scatter by so many robust standard deviations: a loss near zero doubles often.
SPIKE_SIGMAS = 6.0
# Rows of metrics.jsonl that an optimizer step makes: a step that a guard did not apply carries an event.
STEP_EVENTS = (None, "not_finite", "spike")


@dataclass(frozen=True)
class Step:
    """One optimizer step, as its row says it.

    Args:
        at: When its row was written.
        row: Its line of ``metrics.jsonl``.
        spike: Why it is a spike, or None.
    """

    at: float
    row: Row
    spike: str | None = None

    @property
    def is_nonfinite(self) -> bool:
        """Whether its loss or gradient was no number."""
        return is_nonfinite(self.row)


@dataclass(frozen=True)
class Window:
    """What is known at ``now``.

    Args:
        now: The time.
        steps: Of the stage that trains, oldest first.
        samples: Lines of ``system.jsonl``, oldest first.
        sign_at: When training last gave a sign: a row, or its beginning. None: nothing trains.
    """

    now: float
    steps: Sequence[Step] = ()
    samples: Sequence[Row] = ()
    sign_at: float | None = None

    def recent(self, seconds: float) -> Sequence[Step]:
        """The steps of the last ``seconds``."""
        return [step for step in self.steps if step.at > self.now - seconds]

    def sampled(self, seconds: float) -> Sequence[Row]:
        """The samples of the last ``seconds``."""
        return [sample for sample in self.samples if sample["t"] > self.now - seconds]


def is_step(row: Row) -> bool:
    """Whether a row is an optimizer step, applied or not."""
    return row.get("event") in STEP_EVENTS and "loss" in row


def is_nonfinite(row: Row) -> bool:
    """Whether the loss or the gradient of a step was no number (in a file, such a number is null)."""
    numbers = (row.get("loss"), row.get("grad_norm"))
    return row.get("event") == "not_finite" or any(n is not None and not math.isfinite(n) for n in numbers)


def spike_of(row: Row, before: Sequence[Row], limits: MonitorLimitsConfig) -> str | None:
    """Why a step stands out of the steps before it.

    Args:
        row: The step.
        before: Steps of its stage, oldest first; the last :data:`SPIKE_WINDOW` count.
        limits: What a spike is.

    Returns:
        Such as ``gradient norm 41.2, 12 times the median of 50 steps``; None: it does not, or there are too few.
    """
    for name, key, factor in (
        ("gradient norm", "grad_norm", limits.grad_norm_factor),
        ("loss", "loss", limits.loss_factor),
    ):
        value = row.get(key)
        known = [old for past in before[-SPIKE_WINDOW:] if (old := past.get(key)) is not None and math.isfinite(old)]
        if value is None or not math.isfinite(value) or len(known) < SPIKE_LEAST:
            continue
        middle = statistics.median(known)
        if value <= factor * middle or middle <= 0:
            continue
        scatter = 1.4826 * statistics.median(abs(old - middle) for old in known)
        if key == "loss" and value - middle <= SPIKE_SIGMAS * scatter:
            continue
        return f"{name} {value:.4g}, {value / middle:.1f} times the median of {len(known)} steps"
    return None


def median_seconds(steps: Sequence[Step]) -> float:
    """The median time of a step, in seconds; 0 where there are none."""
    gaps = [
        later.row["seconds"] - earlier.row["seconds"]
        for earlier, later in pairwise(steps[-SPIKE_WINDOW:])
        if later.row.get("seconds") is not None and earlier.row.get("seconds") is not None
    ]
    return float(statistics.median(gaps)) if gaps else 0.0
