"""Self-contained HTML pages: one file, no network, light and dark, from a phone's width to a desktop's.

    from mgm_exp.page import Page, paragraph, section, table
    page = Page("Demo data", "2,000 captions")
    page.add(section("Lengths", paragraph("Half of the captions have 3 words or fewer."), table(columns, rows)))
    write_atomic(path, page.html().encode())

Everything that becomes a part of a page is escaped, unless it is :class:`Html` already. A page loads nothing: styles,
the few lines of script that sort tables, pictures and plots are inside it, and its content security policy forbids the
rest.
"""

from mgm_exp.page.blocks import (
    Column,
    Item,
    Tile,
    callout,
    code,
    definitions,
    details,
    figure,
    finding,
    findings,
    gallery,
    grid,
    image,
    note,
    paragraph,
    quotes,
    section,
    subsection,
    table,
    tiles,
)
from mgm_exp.page.html import Html, element, join
from mgm_exp.page.page import Page
from mgm_exp.page.svg import THEME, inline_svg
from mgm_exp.page.thumbnail import thumbnail

__all__ = [
    "THEME",
    "Column",
    "Html",
    "Item",
    "Page",
    "Tile",
    "callout",
    "code",
    "definitions",
    "details",
    "element",
    "figure",
    "finding",
    "findings",
    "gallery",
    "grid",
    "image",
    "inline_svg",
    "join",
    "note",
    "paragraph",
    "quotes",
    "section",
    "subsection",
    "table",
    "thumbnail",
    "tiles",
]
