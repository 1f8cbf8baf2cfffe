"""Open answers of MMMU: an answer is right if what it boils down to holds the reference, or is the same number."""

from __future__ import annotations

import re
from collections.abc import Sequence

_WITH_COMMAS = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
_SCIENTIFIC = re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+")
_SIMPLE = re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = frozenset(":,.!?;'")


def _normal(text: str) -> list[str | float]:
    """A number rounded to two places, or lower-case text; a single character is kept from matching inside words."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _key_parts(response: str) -> list[str]:
    """What stands behind "is", "so", "answer", ... in each sentence; the whole response where nothing does."""
    response = response.strip().strip(".").lower()
    # Sentences would begin with a capital, but the text is in lower case by now: only lines are split. As published.
    lines = re.split(r"\.\s(?=[A-Z])|\n", response)
    parts = []
    for place, line in enumerate(lines):
        marks = (*_INDICATORS, "=") if place == len(lines) - 1 else _INDICATORS
        tails = [line.split(mark)[-1].strip() for mark in marks if mark in line]
        # An empty tail gives way to the next one, whatever its length.
        shortest = None
        for tail in tails:
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in _TRIVIAL:
            parts.append(shortest)
    return parts or [response]


def open_answer_accuracy(prediction: str, answers: Sequence[str] | str) -> float:
    """1 if the prediction states one of the answers, else 0.

    Source: MMMU-Benchmark/MMMU, ``eval/eval_utils.py`` (``parse_open_response``, ``eval_open``).
    """
    wanted = [form for answer in ([answers] if isinstance(answers, str) else answers) for form in _normal(answer)]
    parts = _key_parts(prediction)
    numbers = [found for part in parts for form in (_WITH_COMMAS, _SCIENTIFIC, _SIMPLE) for found in form.findall(part)]
    for given in (form for text in [*parts, *numbers] for form in _normal(text)):
        if isinstance(given, str):
            if any(isinstance(answer, str) and answer in given for answer in wanted):
                return 1.0
        elif given in wanted:
            return 1.0
    return 0.0
