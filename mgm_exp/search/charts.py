"""Charts of a search, as SVG files in its folder: history, importance, parallel coordinates, slices, rungs, Pareto
front."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgm_exp.config import Direction
from mgm_exp.search.drawing import GOOD, INK, LOST, PALE, Drawing, Scale
from mgm_exp.search.rungs import PAUSED

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

# Below so many completed trials, shares of importance would be an invention.
LEAST_FOR_IMPORTANCE = 4
_SLICE, _MARGIN = 240, 56


@dataclass(frozen=True)
class Dot:
    """One trial with a value: completed, or pruned with its last one."""

    number: int
    params: dict[str, Any]
    value: float
    is_pruned: bool


def draw_study(study: Study, folder: Path, objectives: Sequence[str], directions: Sequence[Direction]) -> list[Path]:
    """Writes the charts for which there are trials enough.

    Args:
        study: The Optuna study.
        folder: The sweep's folder.
        objectives, directions: Their names, and which end is better.

    Returns:
        The files that were written.
    """
    if len(objectives) > 1:
        return _pareto(study, folder, objectives, directions)
    trials = study.get_trials(deepcopy=False)
    dots = [
        Dot(trial.number, dict(trial.params), float(trial.value), trial.state.name == "PRUNED")
        for trial in trials
        if trial.value is not None and trial.state.is_finished()
    ]
    done = [dot for dot in dots if not dot.is_pruned]
    climbers = [trial for trial in trials if PAUSED in trial.user_attrs and trial.intermediate_values]
    rungs = [_rungs(climbers, folder / "rungs.svg")] if len(climbers) > 1 else []
    if len(done) < 2:
        return rungs
    name, direction = objectives[0], directions[0]
    drawn = [*rungs, _history(dots, folder / "history.svg", name, direction)]
    distributions = {key: value for trial in trials for key, value in trial.distributions.items()}
    axes = {key: value for key, value in distributions.items() if any(key in dot.params for dot in done)}
    drawn.append(_slices(dots, axes, folder / "slices.svg", name))
    drawn.append(_parallel(dots, axes, folder / "parallel.svg", name, direction))
    shares = importances(study)
    if shares:
        drawn.append(_importance(shares, folder / "importance.svg", name))
    return drawn


def importances(study: Study) -> dict[str, float]:
    """How much each parameter decides whether a trial is a good one (PED-ANOVA); empty before that can be said."""
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    if sum(trial.state.name == "COMPLETE" for trial in study.get_trials(deepcopy=False)) < LEAST_FOR_IMPORTANCE:
        return {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return dict(get_param_importances(study, evaluator=PedAnovaImportanceEvaluator()))
    except (ValueError, RuntimeError, ZeroDivisionError):  # too few trials, or all alike
        return {}


def _history(dots: list[Dot], path: Path, name: str, direction: Direction) -> Path:
    drawing = Drawing(640, 360, f"{name} of each trial")
    x = Scale([float(dot.number) for dot in dots], 70, 610)
    y = Scale([dot.value for dot in dots], 310, 50)
    _axis(drawing, y, x.start - 12)
    better = max if direction is Direction.maximize else min
    best: list[tuple[float, float]] = []
    so_far: float | None = None
    for dot in sorted(dots, key=lambda dot: dot.number):
        if not dot.is_pruned:
            so_far = dot.value if so_far is None else better(so_far, dot.value)
        if so_far is not None:
            best += [(x(dot.number), best[-1][1])] if best else []
            best.append((x(dot.number), y(so_far)))
    drawing.line(best, stroke=INK, width=1.5)
    for dot in dots:
        _dot(drawing, x(dot.number), y(dot.value), dot)
    for number in sorted({dots[0].number, dots[-1].number}):
        drawing.text(x(number), 330, str(number), anchor="middle")
    drawing.text(340, 350, "trial (hollow: pruned, with its last score; line: best so far)", anchor="middle", fill=PALE)
    return drawing.save(path)


def _rungs(climbers: list[FrozenTrial], path: Path) -> Path:
    """How far each trial climbed: a line through its scores, hollow at the rung where it waits or was left."""
    drawing = Drawing(640, 380, "Rungs: how far each trial went")
    x = Scale([float(step) for trial in climbers for step in trial.intermediate_values], 70, 610, log=True)
    y = Scale([value for trial in climbers for value in trial.intermediate_values.values()], 310, 60)
    _axis(drawing, y, x.start - 12)
    for step in sorted({int(trial.user_attrs[PAUSED]) for trial in climbers}):
        if x.low <= step <= x.high:
            drawing.line([(x(step), 52), (x(step), 314)], dash="2 4")
            drawing.text(x(step), 330, str(step), anchor="middle")
    for trial in sorted(climbers, key=lambda trial: len(trial.intermediate_values)):
        points = sorted(trial.intermediate_values.items())
        is_done, waits = trial.state.name == "COMPLETE", not trial.state.is_finished()
        stroke = GOOD if is_done else INK if waits else PALE
        drawing.line([(x(step), y(value)) for step, value in points], stroke=stroke, width=2 if is_done else 1.2)
        step, value = points[-1]
        how = "ran to its end" if is_done else "waits" if waits else "was not promoted"
        says = f"trial {trial.number}: {how}, {value:.4g} at step {step}"
        drawing.point(x(step), y(value), fill=stroke, says=says, is_hollow=not is_done)
    drawing.text(340, 352, "optimizer step (dashed: rungs trials paused at)", anchor="middle")
    drawing.text(
        340, 370, "score; filled: ran to its end; hollow: waits, or was not promoted", anchor="middle", fill=PALE
    )
    return drawing.save(path)


def _importance(shares: dict[str, float], path: Path, name: str) -> Path:
    drawing = Drawing(640, 60 + 30 * len(shares), f"What decides {name}")
    for row, (key, share) in enumerate(sorted(shares.items(), key=lambda item: -item[1])):
        y = 48 + 30 * row
        drawing.text(190, y + 14, key, anchor="end")
        drawing.bar(200, y, 360 * share, 20)
        drawing.text(206 + 360 * share, y + 14, f"{share:.2f}")
    return drawing.save(path)


def _slices(dots: list[Dot], axes: dict[str, Any], path: Path, name: str) -> Path:
    drawing = Drawing(_MARGIN + (_SLICE + 24) * len(axes), 340, f"{name} by each parameter")
    y = Scale([dot.value for dot in dots], 270, 50)
    _axis(drawing, y, _MARGIN - 6)
    for column, (key, distribution) in enumerate(axes.items()):
        left = _MARGIN + 12 + column * (_SLICE + 24)
        mine = [dot for dot in dots if key in dot.params]
        place, ticks = _along(distribution, [dot.params[key] for dot in mine], left, left + _SLICE - 20)
        drawing.line([(left - 8, 282), (left + _SLICE - 8, 282)])
        for text, at in ticks:
            drawing.text(at, 298, text, anchor="middle")
        drawing.text(left + _SLICE / 2, 320, key, anchor="middle", bold=True)
        for dot in mine:
            _dot(drawing, place(dot.params[key]), y(dot.value), dot)
    return drawing.save(path)


def _parallel(dots: list[Dot], axes: dict[str, Any], path: Path, name: str, direction: Direction) -> Path:
    keys = list(axes)
    width = 120 + 150 * len(keys)
    drawing = Drawing(width, 380, f"Every trial: what was chosen, and {name}")
    places: dict[str, tuple[Any, Any]] = {}
    for column, key in enumerate(keys):
        x = 60 + 150 * column
        values = [dot.params[key] for dot in dots if key in dot.params]
        place, ticks = _along(axes[key], values, 320, 60)
        places[key] = (x, place)
        drawing.line([(x, 60), (x, 320)])
        drawing.text(x, 345, key, anchor="middle", bold=True)
        for text, at in ticks:
            drawing.text(x + 5, at + 4, text, fill=PALE)
    x_value, y = 60 + 150 * len(keys), Scale([dot.value for dot in dots], 320, 60)
    drawing.line([(x_value, 60), (x_value, 320)])
    drawing.text(x_value, 345, name, anchor="middle", bold=True)
    for tick in y.ticks():
        drawing.text(x_value + 5, y(tick) + 4, f"{tick:.3g}", fill=PALE)
    order = sorted(dots, key=lambda dot: dot.value if direction is Direction.maximize else -dot.value)
    for rank, dot in enumerate(order):
        points = [(x, place(dot.params[key])) for key, (x, place) in places.items() if key in dot.params]
        points.append((x_value, y(dot.value)))
        is_best = rank == len(order) - 1
        stroke = PALE if dot.is_pruned else GOOD
        drawing.line(
            points,
            stroke=INK if is_best else stroke,
            width=2.5 if is_best else 1.2,
            dash="4 3" if dot.is_pruned else "",
            opacity=0.25 + 0.75 * (rank + 1) / len(order),
        )
    drawing.text(16, 370, "dashed: pruned; black: the best", fill=PALE)
    return drawing.save(path)


def _pareto(study: Study, folder: Path, objectives: Sequence[str], directions: Sequence[Direction]) -> list[Path]:
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    if len(trials) < 2:
        return []
    front = {trial.number for trial in study.best_trials}
    drawing = Drawing(640, 400, f"{objectives[1]} against {objectives[0]}")
    x = Scale([trial.values[0] for trial in trials], 80, 600)
    y = Scale([trial.values[1] for trial in trials], 330, 60)
    _axis(drawing, y, 66)
    for tick in x.ticks():
        drawing.text(x(tick), 352, f"{tick:.3g}", anchor="middle")
    ends = ["larger" if direction is Direction.maximize else "smaller" for direction in directions]
    drawing.text(340, 376, f"{objectives[0]} ({ends[0]} is better)", anchor="middle", bold=True)
    drawing.text(16, 46, f"{objectives[1]} ({ends[1]} is better); filled: the Pareto front", fill=PALE)
    drawing.line(sorted((x(t.values[0]), y(t.values[1])) for t in trials if t.number in front), stroke=PALE, dash="4 3")
    for trial in trials:
        says = f"trial {trial.number}: {', '.join(f'{value:.4g}' for value in trial.values)}; {trial.params}"
        drawing.point(x(trial.values[0]), y(trial.values[1]), says=says, is_hollow=trial.number not in front)
    return [drawing.save(folder / "pareto.svg")]


def _axis(drawing: Drawing, y: Scale, x: float) -> None:
    drawing.line([(x + 4, y.start), (x + 4, y.end)])
    for tick in y.ticks():
        drawing.text(x, y(tick) + 4, f"{tick:.3g}", anchor="end")


def _dot(drawing: Drawing, x: float, y: float, dot: Dot) -> None:
    chosen = ", ".join(f"{key}={value}" for key, value in dot.params.items())
    says = f"trial {dot.number}{' (pruned)' if dot.is_pruned else ''}: {dot.value:.4g}; {chosen}"
    drawing.point(x, y, fill=LOST if dot.is_pruned else GOOD, says=says, is_hollow=dot.is_pruned)


def _along(distribution: Any, values: list[Any], start: float, end: float) -> tuple[Any, list[tuple[str, float]]]:
    """Where a parameter's value lies on an axis, and the axis' marks."""
    choices = getattr(distribution, "choices", None)
    if choices is not None:
        step = (end - start) / max(1, len(choices) - 1)
        at = {
            repr(choice): start + step * i if len(choices) > 1 else (start + end) / 2
            for i, choice in enumerate(choices)
        }
        return (lambda value: at[repr(value)]), [(str(choice), at[repr(choice)]) for choice in choices]
    scale = Scale([float(value) for value in values], start, end, log=bool(distribution.log))
    return (lambda value: scale(float(value))), [(f"{tick:.3g}", scale(tick)) for tick in scale.ticks(3)]
