"""Compares runs by what they wrote down: paired statistics, a verdict in words, a table. No model, no torch.

``mgm_exp.compare(paths)`` and ``from mgm_exp.compare import compare`` are the same function.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from mgm_exp.compare.comparison import compare, compare_runs, write_comparison
from mgm_exp.compare.csv_table import csv_text, write_csv
from mgm_exp.compare.html import write_html
from mgm_exp.compare.latex import latex, write_latex
from mgm_exp.compare.runs import PairingError, Run, load_run, load_runs
from mgm_exp.compare.table import comparison_table, markdown, print_comparison, write_markdown, write_svg

__all__ = [
    "PairingError",
    "Run",
    "compare",
    "compare_runs",
    "comparison_table",
    "csv_text",
    "latex",
    "load_run",
    "load_runs",
    "markdown",
    "print_comparison",
    "write_comparison",
    "write_csv",
    "write_html",
    "write_latex",
    "write_markdown",
    "write_svg",
]


class _CallableModule(ModuleType):
    """Lets notebooks write ``mgm_exp.compare([...])``, although the room has the same name as its main function."""

    def __call__(self, paths: Any, baseline: Path | str | None = None, **options: Any) -> dict[str, Any]:
        return compare(paths, baseline, **options)


sys.modules[__name__].__class__ = _CallableModule
