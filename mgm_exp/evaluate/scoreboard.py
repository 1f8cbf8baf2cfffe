"""The table that an evaluation ends with: every score, its sampling error, and what MGM's authors published."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mgm_exp.evaluate.published import DEFAULT, SOURCE, published

_OF_VARIANTS = ("accuracy", "drop", "drop_ci_low", "drop_ci_high")


@dataclass(frozen=True)
class Line:
    """One score of one benchmark.

    Args:
        benchmark: Its name.
        metric: Without the benchmark's name.
        value: In the metric's own unit; shares lie in 0..1.
        standard_error: Of a mean over questions, clustered by image; None: not known.
        n: Questions.
        published: A model's published score, where the two may stand side by side.
        published_error: Its sampling error.
        published_model: Whose it is.
    """

    benchmark: str
    metric: str
    value: float
    standard_error: float | None
    n: int
    published: float | None
    published_error: float | None
    published_model: str = DEFAULT


def standard_error(scores: Sequence[float], images: Sequence[str]) -> float | None:
    """Standard error of the mean score; questions about one image are not independent, and are taken together.

    Args:
        scores: Score of each question.
        images: Image of each question.

    Returns:
        sqrt(sum over images of (sum of deviations from the mean)^2) / n; None for fewer than two images.

    Source: Miller 2024, "Adding error bars to evals" (arXiv 2411.00640).
    """
    if len(set(images)) < 2:
        return None
    average = math.fsum(scores) / len(scores)
    sums: dict[str, list[float]] = defaultdict(list)
    for score, image in zip(scores, images, strict=True):
        sums[image].append(score - average)
    return math.sqrt(math.fsum(math.fsum(found) ** 2 for found in sums.values())) / len(scores)


def lines_of(
    benchmark: str,
    metrics: Mapping[str, float],
    eval_key: Mapping[str, Any],
    n: int,
    error: float | None,
    model: str = DEFAULT,
) -> list[Line]:
    """The scores of one benchmark, without those of parts (``accuracy[...]``).

    Of a variant (``textvqa.blur3``) only the accuracy and what the change costs.

    Args:
        benchmark: Its name.
        metrics: As in ``result.json``.
        eval_key: The result's.
        n: Questions.
        error: Standard error of the accuracy.
        model: Whose published scores stand beside, by its authors' name.
    """
    known = {one.metric: one for one in published(benchmark, eval_key, model)}
    lines = []
    for name, value in metrics.items():
        metric = name.removeprefix(f"{benchmark}/")
        if "[" in metric or ("." in benchmark and metric not in _OF_VARIANTS):
            continue
        one = known.get(name)
        lines.append(
            Line(
                benchmark,
                metric,
                value,
                error if metric == "accuracy" else None,
                n,
                one.value if one else None,
                one.standard_error if one else None,
                model,
            )
        )
    return lines


def as_json(lines: Sequence[Line]) -> dict[str, Any]:
    """The table for a file."""
    return {"published_source": SOURCE, "lines": [asdict(line) for line in lines]}


def render(lines: Sequence[Line]) -> str:
    """The table as text."""
    model = lines[0].published_model if lines else DEFAULT
    rows: list[tuple[str, ...]] = [("benchmark", "metric", "value", "s.e.", "questions", f"{model}, published")]
    for line in lines:
        theirs = "" if line.published is None else _number(line.published)
        if line.published_error is not None:
            theirs += f" (s.e. {_number(line.published_error)})"
        error = "" if line.standard_error is None else _number(line.standard_error)
        rows.append((line.benchmark, line.metric, _number(line.value), error, str(line.n), theirs))
    if not any(row[-1] for row in rows[1:]):
        rows = [row[:-1] for row in rows]
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    padded = ((cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.1f}"
