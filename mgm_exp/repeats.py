"""Repeats of a trial (``sweep.seeds``): a run folder for each seed, and the mean of what they reach."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_PREFIX = "seed_"


def seeds_of(first: int, count: int) -> list[int]:
    """The seeds of a trial: as many as ``sweep.seeds`` says, from ``seed`` on; none where it runs once."""
    return [] if count == 1 else [first + number for number in range(count)]


def subfolder(seed: int) -> str:
    """The name of a seed's run folder below its trial's."""
    return f"{_PREFIX}{seed}"


def run_dirs(folder: Path) -> list[Path]:
    """The run folders of a trial: one for each seed, or the trial's own."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(_PREFIX))) or [folder]


def finite_metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a ``result.json`` that are numbers."""
    return {
        str(name): float(value)
        for name, value in (result.get("metrics") or {}).items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }


def mean_metrics(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Metrics that all runs of a trial have, averaged."""
    rows = [finite_metrics(result) for result in results]
    if not rows:
        return {}
    names = [name for name in rows[0] if all(name in row for row in rows)]
    return {name: math.fsum(row[name] for row in rows) / len(rows) for name in names}
