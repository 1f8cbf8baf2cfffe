"""Searching: what is searched, who proposes points, who stops hopeless ones, and where it is written down.

Optuna does the proposing and the stopping; this room gives it a search space from Hydra's grammar, storage that
survives any kill, and a meaning for every way in which a trial can end. Names are loaded on first use: importing this
package imports neither Optuna nor Hydra.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "Budget": "budget",
    "Clock": "budget",
    "Ending": "outcome",
    "Expression": "expression",
    "Outcome": "outcome",
    "Reporter": "reports",
    "Space": "space",
    "Verdict": "outcome",
    "draw_study": "charts",
    "judge": "outcome",
    "make_pruner": "pruners",
    "make_sampler": "samplers",
    "storage_place": "study",
    "trial_of": "study",
    "open_database": "study",
    "open_storage": "study",
    "open_study": "study",
    "parse_space": "space",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
