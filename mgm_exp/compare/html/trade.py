"""What accuracy costs, and which settings it comes from: Pareto fronts, parallel coordinates, main effects."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mgm_exp import page
from mgm_exp.compare.differences import shown
from mgm_exp.compare.html.plot import Scale, cloud, dot, frame, line, lines, path, scale_of, short, words
from mgm_exp.compare.html.view import Cells, View, series
from mgm_exp.compare.wording import percent
from mgm_exp.page import Column, Html

CARD_GIB = 24.0
"""Memory of the cards that most people have."""
_NEAR_CARD = 8.0
_FEWEST_COORDINATES = 8
_FEWEST_EFFECTS = 4
_MOST_LABELS = 14
_MOST_DOTS = 60
"""More runs than this are points without names, except for those on the front."""
_LEVELS = 4
"""A setting with more values than this is put into so many groups of equal size."""

Point = tuple[int, float, float]
"""(place of the run, cost, accuracy)"""


def costs(view: View) -> Html | None:
    """Accuracy against memory, time and trained parameters; None without a completed run that has both."""
    quantities: tuple[tuple[str, str, str, Callable[[Mapping[str, Any]], float | None], bool], ...] = (
        ("Peak memory", "memory", "GiB", lambda entry: entry["peak_memory_gib"], False),
        ("Time", "time", "minutes", lambda entry: entry["wall_s"] and entry["wall_s"] / 60, False),
        ("Trained parameters", "parameters", "parameters", lambda entry: entry["trainable"].get("n_total"), True),
    )
    blocks = []
    for benchmark in view.comparison["benchmarks"]:
        plots = []
        for title, what, unit, value, is_log in quantities:
            points = [
                (place, float(cost), 100 * score)
                for place, entry in view.completed
                if (cost := value(entry)) and (score := view.accuracy(entry, benchmark)) is not None
            ]
            if points:
                plots.append(_scatter(view, title, what, unit, points, is_log=is_log))
        if plots:
            heading = f"on {benchmark}" if len(view.comparison["benchmarks"]) > 1 else ""
            blocks.append(page.subsection(heading, page.grid(*plots)) if heading else page.grid(*plots))
    if not blocks:
        return None
    remark = page.note(
        "Up and to the left is better. The line joins the runs that no other run beats in both; whether two of them "
        "differ at all is what the table above says, not this plot."
    )
    return page.section("What accuracy costs", remark, *blocks, anchor="costs")


def pareto(points: Iterable[Point]) -> list[Point]:
    """Points that no other one beats: none is as cheap and higher, or cheaper and as high. Cheapest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p[1], -p[2])):
        if not front or point[2] > front[-1][2]:
            front.append(point)
    return front


def _scatter(view: View, title: str, what: str, unit: str, points: Sequence[Point], *, is_log: bool) -> Html:
    spread = [cost for _, cost, _ in points]
    is_log = is_log and max(spread) / min(spread) > 5
    has_card = what == "memory" and max(spread) >= _NEAR_CARD
    x = scale_of([*spread, CARD_GIB] if has_card else spread, is_log=is_log, margin=0.1)
    y = scale_of([score for _, _, score in points], margin=0.14)
    front = pareto(points)
    corners: list[tuple[float, float]] = []
    for _, cost, score in front:
        if corners:
            corners.append((x.place(cost), corners[-1][1]))
        corners.append((x.place(cost), y.place(score)))
    is_crowded = len(points) > _MOST_DOTS
    behind = [cloud([(x.place(cost), y.place(score)) for _, cost, score in points])] if is_crowded else []
    marks = [lines(*behind, path(corners, "front"))]
    if has_card:
        at = x.place(CARD_GIB)
        marks += [line(at, 0, at, 1, "limit"), words(at, 0.03, "24 GiB", anchor="end", dx=-5, class_="soft")]
    for place, cost, score in front if is_crowded else points:
        name = view.entries[place]["label"]
        said = f"{name}: {score:.1f} % at {short(cost)} {unit}"
        marks.append(dot(x.place(cost), y.place(score), said, series(place)))
    marks += _names(view, front if is_crowded else points, front, x, y)
    caption = f"On the front: {', '.join(view.entries[place]['label'] for place, _, _ in front)}."
    if what == "memory" and not has_card:
        caption += f" All fit a card of {CARD_GIB:.0f} GiB: the most that any run took is {max(spread):.2f} GiB."
    label = f"Accuracy against {what} of {len(points)} runs. {caption}"
    drawing = frame(
        x, y, *marks, label=label, x_title=f"{unit}{', logarithmic' if is_log else ''}", y_title="accuracy, %"
    )
    return page.figure(drawing, title, caption)


def _names(view: View, points: Sequence[Point], front: Sequence[Point], x: Scale, y: Scale) -> list[Html]:
    """Names beside points, those of the front first, as far as they find a free place."""
    width, height = 420, 260  # pixels, about: what the plot has on most screens
    taken = [
        (x.place(cost) * width - 7, y.place(score) * height - 7, x.place(cost) * width + 7, y.place(score) * height + 7)
        for _, cost, score in points
    ]
    found: list[Html] = []
    for place, cost, score in [*front, *(point for point in points if point not in front)]:
        if len(found) >= _MOST_LABELS:
            break
        name = view.entries[place]["label"]
        name = name if len(name) <= 24 else f"{name[:23]}…"
        left, up, long = x.place(cost) * width, y.place(score) * height, 6.6 * len(name)
        for anchor, dx, dy in (("start", 9, 4), ("end", -9, 4), ("middle", 0, -11), ("middle", 0, 19)):
            start = left + dx - {"start": 0.0, "end": long, "middle": long / 2}[anchor]
            middle = up - (dy - 4)
            box = (start, middle - 8, start + long, middle + 8)
            is_free = not any(
                box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3] for other in taken
            )
            if is_free and box[0] >= -4 and box[2] <= width + 4:
                taken.append(box)
                found.append(words(x.place(cost), y.place(score), name, anchor=anchor, dx=dx, dy=dy))
                break
    return found


# -- many runs at once -------------------------------------------------------------------------------------------------


def coordinates(view: View) -> Html | None:
    """Parallel coordinates: every completed run is a line through its settings to its accuracy. None for few runs."""
    keys = view.settings()
    blocks = []
    for benchmark in view.comparison["benchmarks"]:
        scored = [
            (place, entry, 100 * score)
            for place, entry in view.completed
            if (score := view.accuracy(entry, benchmark)) is not None
        ]
        if len(scored) < _FEWEST_COORDINATES or not keys:
            continue
        axes = [_axis([view.value(entry, key) for _, entry, _ in scored]) for key in keys]
        accuracy = scale_of([score for _, _, score in scored])
        n_axes = len(keys) + 1
        at = [k / (n_axes - 1) for k in range(n_axes)]
        order = sorted(score for _, _, score in scored)
        drawn = []
        for place, entry, score in sorted(scored, key=lambda one: one[2]):
            heights = [*(height(view.value(entry, key)) for key, (height, _) in zip(keys, axes, strict=True))]
            quarter = min(3, 4 * order.index(score) // len(order))
            ends = [*heights, accuracy.place(score)]
            drawn.append(path(list(zip(at, ends, strict=True)), f"q{quarter}", data_place=place))
        marks = [lines(*drawn)]
        for place_x, (_, ticks) in zip(at, axes, strict=False):
            marks.append(line(place_x, 0, place_x, 1, "axis"))
            for k, (height_of_tick, text) in enumerate(ticks):
                is_last = place_x > 0.5
                anchor, dx = ("end", -6) if is_last else ("start", 6)
                cut = text if len(text) <= 18 else f"{text[:17]}…"
                marks.append(words(place_x, height_of_tick, cut, anchor=anchor, dx=dx, dy=4 if k else 0))
        marks.append(line(1, 0, 1, 1, "axis"))
        marks += [
            words(1, accuracy.place(value), short(value), anchor="end", dx=-6) for value in accuracy.ticks(5)
        ]  # fmt: skip
        titles = [(place_x, key) for place_x, key in zip(at, [*keys, "accuracy, %"], strict=True)]
        best = max(scored, key=lambda one: one[2])
        label = (
            f"Parallel coordinates of {len(scored)} runs over {', '.join(keys)} and accuracy on {benchmark}; highest: "
            f"{best[1]['label']}, {best[2]:.1f} %"
        )
        drawing = frame(None, None, *marks, label=label, x_ticks=titles, height=300, class_="parallel")
        blocks.append(
            page.figure(
                drawing,
                f"All settings at once, {benchmark}",
                "A line is a run. The darker and thicker, the higher the quarter of the runs it belongs to.",
            )
        )
    return page.section("Settings and accuracy", *blocks, anchor="coordinates") if blocks else None


def _axis(values: Sequence[Any]) -> tuple[Callable[[Any], float], list[tuple[float, str]]]:
    """Where each value lies on its axis, and what stands beside it: numbers by size, the rest by name."""
    numbers = [float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)]
    if len(numbers) == len(values) and len(set(numbers)) > 1:
        is_log = min(numbers) > 0 and max(numbers) / min(numbers) >= 10
        scale = scale_of(numbers, is_log=is_log)
        distinct = sorted(set(numbers))
        told = distinct if len(distinct) <= 6 else scale.ticks()
        return lambda v: scale.place(float(v)), [(scale.place(v), short(v)) for v in told]
    names = list(dict.fromkeys(shown(v) for v in sorted(values, key=lambda v: str(shown(v)))))
    heights = {name: (k + 0.5) / len(names) for k, name in enumerate(names)}
    return lambda v: heights[shown(v)], [(height, name) for name, height in heights.items()]


# -- which setting matters ---------------------------------------------------------------------------------------------


def importance(groups: Mapping[str, Sequence[float]]) -> float:
    """Share of the variance of the accuracies that lies between the groups (eta squared), 0..1."""
    every = [value for values in groups.values() for value in values]
    middle = math.fsum(every) / len(every)
    total = math.fsum((value - middle) ** 2 for value in every)
    between = math.fsum(
        len(values) * (math.fsum(values) / len(values) - middle) ** 2 for values in groups.values() if values
    )
    return between / total if total else 0.0


def levels(values: Sequence[Any]) -> list[str]:
    """The group that each value belongs to: itself, or where there are many numbers, a range of them."""
    distinct = {shown(value) for value in values}
    is_number = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    if len(distinct) <= 6 or not is_number:
        return [shown(value) for value in values]
    ordered = sorted(float(value) for value in values)
    ends = [ordered[len(ordered) * k // _LEVELS] for k in range(_LEVELS)] + [ordered[-1]]
    names = []
    for value in values:
        k = max(k for k in range(_LEVELS) if float(value) >= ends[k])
        names.append(f"{short(ends[k])} to {short(ends[k + 1])}")
    return names


def effects(view: View) -> Html | None:
    """Mean accuracy at each value of each setting, and how much of the variance it goes along with."""
    blocks = []
    for benchmark in view.comparison["benchmarks"]:
        scored = [
            (place, entry, 100 * score)
            for place, entry in view.completed
            if (score := view.accuracy(entry, benchmark)) is not None
        ]
        if len(scored) < _FEWEST_EFFECTS:
            continue
        found = []
        for key in view.settings():
            named = levels([view.value(entry, key) for _, entry, _ in scored])
            groups: dict[str, list[tuple[int, float]]] = {}
            for name, (place, _, score) in sorted(zip(named, scored, strict=True), key=lambda pair: _order(pair[0])):
                groups.setdefault(name, []).append((place, score))
            if 1 < len(groups) < len(scored):
                share = importance({name: [score for _, score in group] for name, group in groups.items()})
                found.append((share, key, groups))
        if not found:
            continue
        found.sort(key=lambda one: -one[0])
        y = scale_of([score for _, _, score in scored], margin=0.1)
        rows: list[Cells] = [
            [key, (f"{share:.0%}", share), ", ".join(f"{name}: {_mean(group):.1f}" for name, group in groups.items())]
            for share, key, groups in found
        ]
        columns = [
            Column("setting"),
            Column("share of the variance", is_number=True),
            Column(f"mean accuracy on {benchmark}, %"),
        ]
        plots = [_effect(view, key, groups, y, share) for share, key, groups in found[:6]]
        blocks += [page.table(columns, rows, name=f"Settings and accuracy on {benchmark}"), page.grid(*plots)]
    if not blocks:
        return None
    remark = page.note(
        "The share of the variance between the values of a setting, each setting taken alone (eta squared). Settings "
        "that change together share it, and with few runs chance alone has some: this says where to look, not what is "
        "proven."
    )
    return page.section("Which settings matter", remark, *blocks, anchor="effects")


def _order(level: str) -> tuple[bool, float, str]:
    """Levels that begin with a number by its size, then the others by name."""
    try:
        return (False, float(level.split(" ")[0]), level)
    except ValueError:
        return (True, 0.0, level)


def _mean(group: Sequence[tuple[int, float]]) -> float:
    return math.fsum(score for _, score in group) / len(group)


def _effect(view: View, key: str, groups: Mapping[str, Sequence[tuple[int, float]]], y: Scale, share: float) -> Html:
    marks, ticks, means = [], [], []
    crowd: list[tuple[float, float]] = []
    is_crowded = sum(map(len, groups.values())) > _MOST_DOTS
    for k, (name, group) in enumerate(groups.items()):
        at = (k + 0.5) / len(groups)
        ticks.append((at, name if len(name) <= 16 else f"{name[:15]}…"))
        means.append((at, y.place(_mean(group))))
        for j, (place, score) in enumerate(group):
            aside = (j / (len(group) - 1) - 0.5) * min(0.3, 0.5 / len(groups)) if len(group) > 1 else 0.0
            if is_crowded:
                crowd.append((at + aside, y.place(score)))
            else:
                said = f"{view.entries[place]['label']}: {score:.1f} %"
                marks.append(dot(at + aside, y.place(score), said, "plain", 4))
    drawn = lines(*([cloud(crowd)] if is_crowded else []), path(means, "mean"))
    label = f"Accuracy by {key}: " + ", ".join(f"{name} {_mean(group):.1f} %" for name, group in groups.items())
    drawing = frame(
        None, y, drawn, *marks, label=label, x_ticks=ticks, y_title="accuracy, %", height=190, class_="by-level"
    )
    return page.figure(drawing, key, f"{percent(share)} % of the variance. Points are runs, the line joins the means.")
