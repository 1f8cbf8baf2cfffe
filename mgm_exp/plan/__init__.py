"""What a run needs and costs, before it starts: memory, time and disk, from its configuration alone.

Names are loaded on first use: the sizes of a model come from its own code, which imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "Calibration": "calibration",
    "calibrate": "calibration",
    "CellPlan": "cell",
    "fitted": "stage_plan",
    "Curated": "lengths",
    "Measured": "cell",
    "plan_cell": "cell",
    "predicted_hours": "cell",
    "predicted_memory_gib": "cell",
    "Architecture": "architecture",
    "architecture_of": "architecture",
    "parameters_of": "architecture",
    "Work": "activations",
    "Moment": "memory",
    "moments": "memory",
    "CARDS": "cards",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
