"""A small SVG drawing: lines, points, bars and texts, in one file that needs nothing else to be shown."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

from mgm_exp.store import write_atomic

INK, PALE, GOOD, LOST = "#1f2933", "#9aa5b1", "#0b7285", "#c92a2a"


class Drawing:
    """An SVG of a given size in pixels; the origin is at the top left.

    Args:
        width, height: In pixels.
        title: Said at the top, and to screen readers.
    """

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self._parts: list[str] = []
        self.text(16, 26, title, size=15, bold=True)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: int = 11,
        anchor: str = "start",
        bold: bool = False,
        fill: str = INK,
    ) -> None:
        """A line of text whose baseline begins (or, with ``anchor``, ends) at a point."""
        weight = ' font-weight="600"' if bold else ""
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}"{weight}>'
            f"{escape(text)}</text>"
        )

    def line(
        self,
        points: list[tuple[float, float]],
        *,
        stroke: str = PALE,
        width: float = 1,
        dash: str = "",
        opacity: float = 1,
    ) -> None:
        """A line through points."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self._parts.append(
            f'<polyline points="{path}" fill="none" stroke="{stroke}" stroke-width="{width}" '
            f'stroke-opacity="{opacity:.2f}"{dashed}/>'
        )

    def point(self, x: float, y: float, *, fill: str = GOOD, says: str = "", is_hollow: bool = False) -> None:
        """A dot; ``says`` is shown when the pointer rests on it."""
        colours = f'fill="white" stroke="{fill}"' if is_hollow else f'fill="{fill}"'
        self._parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" {colours}><title>{escape(says)}</title></circle>')

    def bar(self, x: float, y: float, width: float, height: float, *, fill: str = GOOD) -> None:
        """A filled rectangle."""
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height:.1f}" fill="{fill}"/>'
        )

    def save(self, path: Path) -> Path:
        """Writes the file whole."""
        content = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" font-family="system-ui, sans-serif" role="img" '
            f'aria-label="{escape(self.title)}">\n'
            f'<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(self._parts) + "\n</svg>\n"
        )
        write_atomic(path, content)
        return path


class Scale:
    """Values to pixels.

    Args:
        values: All that have to fit.
        start, end: Pixels of the smallest and of the largest.
        log: Whether the scale is logarithmic.
    """

    def __init__(self, values: list[float], start: float, end: float, *, log: bool = False) -> None:
        self.log = log and min(values) > 0
        self.low, self.high = min(values), max(values)
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        share = 0.5 if high == low else (value - low) / (high - low)
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int = 4) -> list[float]:
        """Values to be written at the axis."""
        if self.low == self.high:
            return [self.low]
        if self.log:
            ratio = (self.high / self.low) ** (1 / (count - 1))
            return [self.low * ratio**i for i in range(count)]
        return [self.low + (self.high - self.low) * i / (count - 1) for i in range(count)]
