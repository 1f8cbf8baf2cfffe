"""The blocks of a page: sections, findings, tiles of numbers, tables, figures, galleries."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from mgm_exp.page.html import Html, element, join

Level = Literal["good", "note", "warning", "problem"]
_LEVEL_NAMES = {"good": "Good", "note": "Worth knowing", "warning": "Look at this", "problem": "Problem"}
_MARKS = {"good": "✓", "note": "i", "warning": "!", "problem": "×"}


@dataclass(frozen=True)
class Tile:
    """One number that is seen first.

    Args:
        label: What it is.
        value: As it is shown.
        detail: A few words below it.
        level: Colours the tile where something is wrong.
        is_long: The value is set smaller, on one line.
    """

    label: str
    value: str
    detail: str = ""
    level: Level | None = None
    is_long: bool = False


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Args:
        title: Its heading.
        is_number: Numbers are set to the right and sorted by size.
    """

    title: str
    is_number: bool = False


@dataclass(frozen=True)
class Item:
    """One picture of a gallery.

    Args:
        picture: See :func:`image`; None shows an empty frame.
        title: Below it.
        detail: Below that, smaller.
    """

    picture: Html | None
    title: str = ""
    detail: str = ""


def section(title: str, *blocks: Html, anchor: str) -> Html:
    """A part of the page with a heading and an address."""
    return element("section", element("h2", title), *blocks, id=anchor)


def subsection(title: str, *blocks: Html) -> Html:
    """A smaller heading and what belongs to it."""
    return element("div", element("h3", title), *blocks, class_="subsection")


def paragraph(*parts: str) -> Html:
    """Running text."""
    return element("p", *parts)


def note(*parts: str) -> Html:
    """Running text that explains, smaller and softer."""
    return element("p", *parts, class_="note")


def code(text: str) -> Html:
    """A command or a file, as it is typed."""
    return element("pre", element("code", text))


def callout(level: Level, *parts: str) -> Html:
    """A remark that must not be missed."""
    return element("div", *parts, class_=f"callout {level}")


def finding(level: Level, sentence: str, *more: str) -> Html:
    """One finding: a sentence that says it all, and what follows from it."""
    return element(
        "li",
        element("span", _MARKS[level], class_="mark", title=_LEVEL_NAMES[level], aria_label=_LEVEL_NAMES[level]),
        element(
            "div", element("p", sentence, class_="sentence"), *(element("p", text, class_="more") for text in more)
        ),
        class_=f"finding {level}",
    )


def findings(items: Iterable[Html]) -> Html:
    """Findings, one below the other."""
    return element("ul", *items, class_="findings")


def tiles(items: Iterable[Tile]) -> Html:
    """Numbers side by side."""
    return element(
        "dl",
        *(
            element(
                "div",
                element("dt", item.label),
                element("dd", item.value),
                element("dd", item.detail, class_="detail") if item.detail else Html(""),
                class_=" ".join(filter(None, ["tile", item.level, "long" if item.is_long else None])),
            )
            for item in items
        ),
        class_="tiles",
    )


def table(
    columns: Sequence[Column],
    rows: Iterable[Sequence[str | tuple[str, float | None]]],
    *,
    name: str = "",
    is_sortable: bool = True,
) -> Html:
    """A table; a click on a heading sorts it.

    Args:
        columns: The headings.
        rows: Cells in the order of the columns: what is shown, or (what is shown, the number to sort by).
        name: What the table holds, for those who do not see the heading above it.
        is_sortable: Whether headings are buttons.
    """
    rows = [[given for given, _ in zip(row, columns, strict=True)] for row in rows]

    def heading(column: Column) -> Html:
        title = element("button", column.title, type="button") if is_sortable else column.title
        return element("th", title, scope="col", class_="number" if column.is_number else None)

    is_plain = [column.is_number and _sorts_as_shown([row[k] for row in rows]) for k, column in enumerate(columns)]

    def cell(given: str | tuple[str, float | None], place: int) -> Html:
        shown, key = given if isinstance(given, tuple) else (given, None)
        sort_key = ("" if key is None else repr(float(key))) if isinstance(given, tuple) else None
        kind = "number" if columns[place].is_number else None
        sort_key = None if is_plain[place] and (key is None or _leading(shown) is not None) else sort_key
        if place == 0:
            return element("th", shown, scope="row", class_=kind, data_key=sort_key)
        return element("td", shown, class_=kind, data_key=sort_key)

    body = [element("tr", *(cell(given, place) for place, given in enumerate(row))) for row in rows]
    return element(
        "div",
        element(
            "table",
            element("caption", name, class_="unseen") if name else Html(""),
            element("thead", element("tr", *map(heading, columns))),
            element("tbody", *body),
            class_="sortable" if is_sortable else None,
        ),
        class_="scroll",
        tabindex=0,
        role="region" if name else None,
        aria_label=name or None,
    )


def _sorts_as_shown(cells: Sequence[str | tuple[str, float | None]]) -> bool:
    """Whether a column sorts by the numbers that it shows: then they need not stand in the page twice."""
    pairs = [(key, _leading(shown)) for shown, key in (c for c in cells if isinstance(c, tuple))]
    known = [(key, shown) for key, shown in pairs if key is not None]
    if len(pairs) < len(cells) or any(key is None and shown is not None for key, shown in pairs):
        return False
    # Shown are percent, say, and the keys are shares: only zero is the same in both.
    if any(shown is None and key != 0 for key, shown in known):
        return False
    places = [0.0 if shown is None else shown for _, shown in sorted(known, key=lambda pair: pair[0])]
    return all(a <= b for a, b in pairwise(places))


def _leading(shown: str) -> float | None:
    """The number that a text begins with, as ``script.js`` reads it."""
    found = re.match(r"[+-]?\d[\d,]*(\.\d+)?(e[+-]?\d+)?(?![\w.])", shown)
    return float(found[0].replace(",", "")) if found else None


def figure(drawing: Html, title: str, *caption: str) -> Html:
    """A plot with its title and what is to be seen in it."""
    return element("figure", element("h3", title), drawing, element("figcaption", *caption) if caption else Html(""))


def grid(*blocks: Html) -> Html:
    """Figures side by side where there is room."""
    return element("div", *blocks, class_="grid")


def image(content: bytes, kind: Literal["png", "jpeg"], alt: str) -> Html:
    """A picture inside the page."""
    encoded = base64.b64encode(content).decode("ascii")
    return element("img", src=f"data:image/{kind};base64,{encoded}", alt=alt)


def gallery(items: Iterable[Item]) -> Html:
    """Pictures with captions, side by side."""
    return element(
        "ul",
        *(
            element(
                "li",
                item.picture if item.picture is not None else element("div", "no picture", class_="empty"),
                element("p", item.title, class_="title") if item.title else Html(""),
                element("p", item.detail, class_="detail") if item.detail else Html(""),
            )
            for item in items
        ),
        class_="gallery",
    )


def quotes(items: Iterable[tuple[str, str]]) -> Html:
    """Texts of the data: (text, what is to be said of it)."""
    return element(
        "ul",
        *(element("li", element("q", text or " "), element("span", detail, class_="detail")) for text, detail in items),
        class_="quotes",
    )


def details(summary: str, *blocks: Html, is_open: bool = False) -> Html:
    """What is folded away until somebody asks."""
    return element("details", element("summary", summary), *blocks, open=is_open)


def definitions(items: Iterable[tuple[str, str]]) -> Html:
    """Words and what they mean here."""
    return element(
        "dl", *(join([element("dt", term), element("dd", meaning)]) for term, meaning in items), class_="definitions"
    )
