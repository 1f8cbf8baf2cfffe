"""Exploration of a dataset: its captions and images in numbers that can be compared (docs/exploration.md).

Names are loaded on first use: the statistics of captions need neither plots nor pages.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mgm_exp.data.exploration.compare import Comparison, compare_explorations
    from mgm_exp.data.exploration.comparison_report import write_comparison
    from mgm_exp.data.exploration.exploration import Exploration, explore
    from mgm_exp.data.exploration.findings import Finding
    from mgm_exp.data.exploration.reading import Options
    from mgm_exp.data.exploration.text import text_statistics
    from mgm_exp.data.exploration.token_lengths import model_max_length, tokenizer_file
    from mgm_exp.data.exploration.writing import check_folder, default_folder, write_exploration

_HOMES = {
    "Comparison": "compare",
    "Exploration": "exploration",
    "Finding": "findings",
    "Options": "reading",
    "check_folder": "writing",
    "compare_explorations": "compare",
    "default_folder": "writing",
    "explore": "exploration",
    "model_max_length": "token_lengths",
    "text_statistics": "text",
    "tokenizer_file": "token_lengths",
    "write_comparison": "comparison_report",
    "write_exploration": "writing",
}

__all__ = [
    "Comparison",
    "Exploration",
    "Finding",
    "Options",
    "check_folder",
    "compare_explorations",
    "default_folder",
    "explore",
    "model_max_length",
    "text_statistics",
    "tokenizer_file",
    "write_comparison",
    "write_exploration",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
