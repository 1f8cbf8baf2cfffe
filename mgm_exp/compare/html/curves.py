"""Learning curves: loss, gradient norm, learning rate and speed by step, align and instruct each for itself.

Runs that share a stage (the same align stage behind several adapters) are one curve: it was computed once. Long curves
are thinned so that spikes stay: of each stretch of steps the lowest and the highest loss and the highest gradient norm
are kept.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mgm_exp import page
from mgm_exp.compare.html.overview import swatch
from mgm_exp.compare.html.plot import Scale, frame, lines, path, scale_of, short
from mgm_exp.compare.html.view import Cells, View, series
from mgm_exp.compare.runs import Run
from mgm_exp.compare.wording import count
from mgm_exp.page import Column, Html, element
from mgm_exp.store import parse_record, read_text

_QUANTITIES = (
    ("loss", "Loss", ""),
    ("grad_norm", "Gradient norm", "before clipping"),
    ("lr", "Learning rate", ""),
    ("tokens_per_s", "Speed", "tokens per second"),
)
_STAGES = {"align": "Align stage", "instruct": "Instruct stage"}
_POINTS = 7_000
"""Points of all curves together: about 80 kB of the page."""
_MOST_CURVES = 32
_WIDE = 100.0
"""From this ratio of highest to lowest on, a scale is logarithmic."""


@dataclass
class Curve:
    """One stage of training, and all runs that have it in common.

    Args:
        places: Of the runs in the comparison.
        rows: Lines of ``metrics.jsonl`` that are optimizer steps.
    """

    places: list[int]
    rows: list[Mapping[str, Any]] = field(repr=False)


def learning_curves(view: View) -> Html | None:
    """A section with a set of plots for each stage; None where no run kept ``metrics.jsonl``."""
    chosen = drawn_runs(view)
    stages: dict[str, list[Curve]] = {}
    for place in chosen:
        run = view.run(view.entries[place]["run_dir"])
        for stage, curve in (_read(run) if run else {}).items():
            same = next((one for one in stages.setdefault(stage, []) if _are_equal(one.rows, curve)), None)
            if same:
                same.places.append(place)
            else:
                stages[stage].append(Curve([place], curve))
    if not stages:
        return None
    n_curves = sum(len(curves) for curves in stages.values())
    most = max(12, _POINTS // (n_curves * len(_QUANTITIES)))
    blocks = [legend(view, sorted({place for found in stages.values() for one in found for place in one.places}))]
    for stage in sorted(stages, key=list(_STAGES).index if set(stages) <= set(_STAGES) else None):
        blocks.append(_of_stage(view, stage, stages[stage], most))
    remark = (
        "Drag over a plot to zoom, double-click to see all of it again; with the keyboard: the buttons of each plot, "
        "or +, -, the arrow keys and 0 once it has the focus. Stages have plots of their own, because "
        "their losses are not alike."
    )
    left_out = sum(1 for entry in view.entries if entry["status"] != "running") - len(chosen)
    if len(view.entries) > len(chosen) and left_out > 0:
        remark += f" The baseline and the {len(chosen) - 1} highest runs are drawn, {left_out} are not."
    return page.section("Learning curves", page.note(remark), *blocks, anchor="curves")


def drawn_runs(view: View) -> list[int]:
    """Places of all runs, or of the baseline and the best of too many."""
    places = list(range(len(view.entries)))
    if len(places) <= _MOST_CURVES:
        return places
    benchmark = (view.comparison["benchmarks"] or [""])[0]

    def rank(place: int) -> tuple[bool, float]:
        entry = view.entries[place]
        return (not view.is_baseline(entry), -(view.accuracy(entry, benchmark) or -1.0))

    return sorted(sorted(places, key=rank)[:_MOST_CURVES])


def _read(run: Run) -> dict[str, list[Mapping[str, Any]]]:
    """Optimizer steps of each stage; a line cut off by a kill is left out."""
    try:
        text = read_text(run.path / "metrics.jsonl", errors="replace")
    except (OSError, ValueError):
        return {}
    stages: dict[str, list[Mapping[str, Any]]] = {}
    for line in text.splitlines():
        try:
            row = parse_record(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "event" not in row and number(row.get("step")) is not None:
            stages.setdefault(str(row.get("stage")), []).append(row)
    return stages


def _are_equal(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> bool:
    keys = ("step", "loss", "grad_norm", "lr", "seconds")
    return len(one) == len(other) and all(a.get(k) == b.get(k) for a, b in zip(one, other, strict=True) for k in keys)


def number(value: Any) -> float | None:
    """A finite number; None for anything else."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    try:
        found = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return None
    return found if math.isfinite(found) else None


def thinned(rows: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """At most about ``most`` rows: the first, the last, and the extremes of each stretch between."""
    if len(rows) <= most:
        return list(rows)
    kept = {0, len(rows) - 1}
    n_bins = max(1, most // 3)
    for k in range(n_bins):
        part = range(k * len(rows) // n_bins, (k + 1) * len(rows) // n_bins)
        for key, pick in (("loss", min), ("loss", max), ("grad_norm", max)):
            known = [(value, place) for place in part if (value := number(rows[place].get(key))) is not None]
            if known:
                kept.add(pick(known)[1])
    return [rows[place] for place in sorted(kept)]


def _of_stage(view: View, stage: str, curves: Sequence[Curve], most: int) -> Html:
    thin = [(curve, thinned(curve.rows, most)) for curve in curves]
    plots = []
    for key, title, unit in _QUANTITIES:
        known = [
            (curve.places, [(float(row["step"]), value) for row in rows if (value := number(row.get(key))) is not None])
            for curve, rows in thin
        ]
        what = f"{title}, {_STAGES.get(stage, stage).lower()}"
        plots += curve_plot(view, title, what, unit, "optimizer step", known, from_zero=key in ("lr", "tokens_per_s"))
    return page.subsection(_STAGES.get(stage, stage), page.grid(*plots), _numbers(view, curves))


def curve_plot(
    view: View,
    title: str,
    what: str,
    unit: str,
    x_title: str,
    known: Sequence[tuple[list[int], list[tuple[float, float]]]],
    *,
    from_zero: bool,
) -> list[Html]:
    """A plot that zooms, or nothing where there are no points.

    Args:
        what: Of what it is, for those who cannot see it.
        known: Places of the runs that a curve belongs to, and its points.
        from_zero: Whether zero is on the scale.
    """
    known = [(places, points) for places, points in known if points]
    if not known:
        return []
    values = [value for _, points in known for _, value in points]
    at = [x for _, points in known for x, _ in points]
    is_log = not from_zero and min(values) > 0 and max(values) / statistics.median(values) > _WIDE
    y = scale_of([*values, 0.0] if from_zero else values, is_log=is_log)
    first, last = min(at), max(at)
    x = Scale(first - 0.5, last + 0.5) if last == first else Scale(first, last)
    drawn = [
        path(
            [(x.place(step), y.place(value)) for step, value in points],
            series(places[0]),
            data_runs=" ".join(map(str, places)),
            data_name=", ".join(view.entries[place]["label"] for place in places),
        )
        for places, points in known
    ]
    axis: dict[str, Any] = {
        "data_x0": x.low,
        "data_x1": x.high,
        "data_y0": y.low,
        "data_y1": y.high,
        "data_ylog": int(y.is_log),
    }
    drawing = frame(
        x,
        y,
        lines(*drawn),
        label=f"{what}: {len(known)} curves from {x_title} {first:g} to {last:g}; the table below has their numbers",
        x_title=x_title,
        y_title=f"{unit}{', logarithmic' if is_log else ''}".strip(", "),
        height=230,
        class_="zoom",
        **axis,
    )
    return [page.figure(drawing, title)]


def legend(view: View, places: Sequence[int]) -> Html:
    """The runs with their colours; a click hides or shows a run in all plots."""
    buttons = [
        element(
            "button",
            swatch(place),
            element("span", view.entries[place]["label"]),
            type="button",
            aria_pressed="true",
            data_run=place,
        )
        for place in places
    ]
    return element("div", *buttons, class_="legend", role="group", aria_label="Show or hide runs in the curves")


def _numbers(view: View, curves: Sequence[Curve]) -> Html:
    """The curves as a table, for those who cannot see them or want the numbers."""
    columns = [
        Column("run"),
        *(
            Column(title, is_number=True)
            for title in ("steps", "first loss", "last loss", "median grad norm", "highest grad norm", "tokens/s")
        ),
    ]
    rows: list[Cells] = []
    for curve in curves:
        losses, norms, speeds = (
            [value for row in curve.rows if (value := number(row.get(key))) is not None]
            for key in ("loss", "grad_norm", "tokens_per_s")
        )
        last = statistics.fmean(losses[-10:]) if losses else None
        cells = [
            losses[0] if losses else None,
            last,
            statistics.median(norms) if norms else None,
            max(norms) if norms else None,
        ]
        speed = statistics.median(speeds) if speeds else None
        rows.append(
            [
                ", ".join(view.entries[place]["label"] for place in curve.places),
                (f"{len(curve.rows):,}", float(len(curve.rows))),
                *((("-" if cell is None else short(cell)), cell) for cell in cells),
                (count(speed), speed),
            ]
        )
    return page.details(
        "The same in numbers",
        page.table(columns, rows, name="Curves in numbers"),
        page.note("Last loss: mean of the last 10 steps."),
    )
