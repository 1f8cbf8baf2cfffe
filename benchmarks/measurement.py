"""What a benchmark gives: one row of ``results.json`` for each thing that was compared."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True)
class Row:
    """One comparison.

    Args:
        name: What was compared.
        unit: Of ``ours`` and ``peer``.
        ours, peer: Measured in the same run, on the same data; less is better.
        goal: The ratio that is wanted; None: there is none, the number is for information.
        exactness: How the two results were compared, and what came out.
        evidence: What exactly was run, with its numbers.
        most: The ratio of the least that the work can take, whoever does it, measured in the same run; a goal above it
            cannot be met. None: not measured.
    """

    name: str
    unit: str
    ours: float
    peer: float
    goal: float | None
    exactness: str
    evidence: str
    most: float | None = None

    @property
    def ratio(self) -> float:
        """How many times less ours takes."""
        return self.peer / self.ours

    def to_json(self) -> dict[str, Any]:
        rounded = {"ours": round(self.ours, 3), "peer": round(self.peer, 3), "ratio": round(self.ratio, 2)}
        met = None if self.goal is None else self.ratio >= self.goal
        most = None if self.most is None else round(self.most, 2)
        return {**asdict(self), **rounded, "met": met, "most": most}


def is_missed(row: dict[str, Any]) -> bool:
    """Whether a row of ``results.json`` has a goal that is not met, though it could be."""
    return row["met"] is False and not is_out_of_reach(row)


def is_out_of_reach(row: dict[str, Any]) -> bool:
    """Whether its goal is above what was measured to be possible."""
    return row["goal"] is not None and row.get("most") is not None and row["most"] < row["goal"]


def timed(work: Callable[[], Result]) -> tuple[float, Result]:
    """Wall seconds of a call, and what it gave."""
    gc.collect()
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result
