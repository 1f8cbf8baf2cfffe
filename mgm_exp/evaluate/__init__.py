"""Benchmarks, batched generation and metrics: from a model and the user's files to a score for every question.

Names are loaded on first use: asking for a metric must not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "Benchmark": "benchmarks",
    "Question": "benchmarks",
    "load_benchmark": "benchmarks",
    "Candidate": "generate",
    "EvalResult": "generate",
    "Examiner": "examiner",
    "Generator": "generator",
    "shares_base": "base",
    "evaluate": "generate",
    "write_gallery": "gallery",
    "HeldOut": "held_out",
    "Guessed": "question_only",
    "score_guesses": "question_only",
    "Line": "scoreboard",
    "as_json": "scoreboard",
    "lines_of": "scoreboard",
    "published_as": "published",
    "render": "scoreboard",
    "answer_counts": "robustness",
    "long_tail": "robustness",
    "variants": "robustness",
    "evaluate_weights": "weights",
    "load_weights": "weights",
    "question_only_accuracy": "weights",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
