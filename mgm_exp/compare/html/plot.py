"""Plots as a part of a page: an SVG that stretches with the page, and labels beside it that keep their size.

Places are percentages of the plot's area, so that a phone shows the same plot with the same letters, only narrower.
What must be a line through many points lies in an inner drawing of :data:`SIDE` x :data:`SIDE` units.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mgm_exp.page import Html, element

SIDE = 10_000
"""Units of the inner drawing on both sides: fine enough to zoom into."""


@dataclass(frozen=True)
class Scale:
    """From values to places.

    Args:
        low, high: Values at the two ends; low < high.
        is_log: Whether equal steps are equal ratios; needs low > 0.
    """

    low: float
    high: float
    is_log: bool = False

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        low, high, x = (math.log10(v) if self.is_log else v for v in (self.low, self.high, value))
        return (x - low) / (high - low)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values inside the scale."""
        if not self.is_log:
            return round_values(self.low, self.high, most)
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        powers = range(first, last + 1, max(1, math.ceil((last - first) / most)))
        found = [10.0**power for power in powers]
        if len(found) >= 2:
            return found
        finer = [digit * 10.0**power for power in range(first - 1, last + 1) for digit in (1, 2, 5)]
        return [value for value in finer if self.low * 0.999 <= value <= self.high * 1.001]


def round_values(low: float, high: float, most: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten between two values, at most ``most`` of them."""
    raw = (high - low) / max(1, most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * digit for digit in (1, 2, 5, 10) if power * digit >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(step * k, 12) for k in range(first, last + 1)]


def scale_of(values: Iterable[float], *, is_log: bool = False, margin: float = 0.06) -> Scale:
    """A scale that holds all values with a margin; never empty.

    Args:
        values: Finite numbers, at least one.
        is_log: Ignored where some value is not above 0.
        margin: Share of the scale that stays free at each end.
    """
    found = list(values)
    low, high = min(found), max(found)
    if is_log and low > 0:
        room = max(math.log10(high / low), 0.1) * margin + (0.05 if high == low else 0)
        return Scale(low / 10**room, high * 10**room, is_log=True)
    room = (high - low) * margin if high > low else max(abs(high) * 0.1, 1e-9)
    return Scale(low - room, high + room)


def short(value: float) -> str:
    """A value as a tick says it: ``0.005``, ``5e-07``, ``12k``, ``1.5M``."""
    size = abs(value)
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            return f"{value / (1e3 if letter == 'k' else unit):.4g}{letter}"
    return f"{value:.4g}" if size == 0 or size >= 1e-4 else f"{value:.1e}".replace("e-0", "e-")


def percent_place(share: float) -> str:
    """A place as an attribute says it."""
    return f"{100 * share:.2f}%"


def dot(x: float, y: float, title: str, class_: str = "", radius: float = 5.5) -> Html:
    """A point at a place in 0..1 (y upwards) that says what it is."""
    return element(
        "circle",
        element("title", title),
        cx=percent_place(x),
        cy=percent_place(1 - y),
        r=radius,
        class_=f"dot {class_}".strip(),
    )


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Html:
    """A straight line between two places (y upwards)."""
    places = [percent_place(v) for v in (x1, 1 - y1, x2, 1 - y2)]
    return element("line", x1=places[0], y1=places[1], x2=places[2], y2=places[3], class_=class_)


def words(
    x: float, y: float, text: str, *, anchor: str = "start", dx: float = 0, dy: float = 4, class_: str = ""
) -> Html:
    """Text at a place, with a halo so that it can be read over lines; dx and dy in pixels."""
    return element(
        "text",
        text,
        x=percent_place(x),
        y=percent_place(1 - y),
        dx=dx,
        dy=dy,
        text_anchor=anchor,
        class_=f"words {class_}".strip(),
    )


def path(points: Sequence[tuple[float, float]], class_: str = "", **attributes: str | int | None) -> Html:
    """A line through places (y upwards); belongs into :func:`lines`."""
    text = " ".join(f"{round(SIDE * x)},{round(SIDE * (1 - y))}" for x, y in points)
    return element("polyline", points=text, class_=f"path {class_}".strip(), **attributes)


def cloud(points: Sequence[tuple[float, float]]) -> Html:
    """Many places as points without names, a twentieth as long as :func:`dot`; belongs into :func:`lines`."""
    text = "".join(f"M{round(SIDE * x)} {round(SIDE * (1 - y))}h0" for x, y in points)
    return element("path", d=text, class_="cloud")


def lines(*paths: Html) -> Html:
    """The inner drawing: lines that stretch while their strokes keep their width."""
    return element(
        "svg", *paths, viewBox=f"0 0 {SIDE} {SIDE}", preserveAspectRatio="none", width="100%", height="100%",
        class_="lines",
    )  # fmt: skip


def frame(
    x: Scale | None,
    y: Scale | None,
    *marks: Html,
    label: str,
    x_title: str = "",
    y_title: str = "",
    x_ticks: Sequence[tuple[float, str]] | None = None,
    height: int = 260,
    class_: str = "",
    **attributes: str | int | float | bool | None,
) -> Html:
    """Axes around marks.

    Args:
        x, y: The scales; None draws no ticks on that side.
        marks: What is drawn, by :func:`dot`, :func:`line`, :func:`words`, :func:`lines`.
        label: The plot in words, for those who do not see it.
        x_title, y_title: What the axes show, with the unit.
        x_ticks: (place in 0..1, text) instead of the scale's own.
        height: Of the area, in pixels.
        class_, attributes: Of the element around all.
    """
    below = x_ticks if x_ticks is not None else [(x.place(v), short(v)) for v in x.ticks()] if x else []
    beside = [(y.place(v), short(v)) for v in y.ticks()] if y else []
    grid = [line(0, place, 1, place, "gridline") for place, _ in beside]
    area = element(
        "svg",
        element("g", *grid, class_="grid-lines"),
        *marks,
        width="100%",
        height=height,
        aria_hidden="true",
        focusable="false",
    )
    return element(
        "div",
        element("span", y_title, class_="y-title") if y_title else Html(""),
        element(
            "div",
            area,
            *(element("span", text, class_="y-tick", style=f"top:{percent_place(1 - at)}") for at, text in beside),
            *(element("span", text, class_="x-tick", style=f"left:{percent_place(at)}") for at, text in below),
            class_="area",
        ),
        element("span", x_title, class_="x-title") if x_title else Html(""),
        class_=f"plot {class_}".strip(),
        role="img",
        aria_label=label,
        **attributes,
    )
