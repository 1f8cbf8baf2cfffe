"""What became of measuring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from mgm_exp.data.recipe import VALUES

__all__ = ["VALUES", "MeasureReport", "Progress"]

Progress = Callable[[str, int, int], None]
"""Called with (what, rows done, rows in all)."""


@dataclass(frozen=True)
class MeasureReport:
    """What was measured, by what.

    Args:
        engine: ``builtin``, or Data-Juicer's name and version.
        executor: ``default`` or ``ray``; of the builtin engine: ``default``.
        rows: Rows measured: every row of the file.
        from_before: Rows whose values an interrupted attempt had written.
        values: Keys of the values.
    """

    engine: str
    executor: str
    rows: int
    from_before: int
    values: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "values": list(self.values)}
