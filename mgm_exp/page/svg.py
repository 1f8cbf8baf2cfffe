"""Plots inside a page: SVG whose colours follow the page's light or dark theme, and that can do nothing but be seen.

A plot is drawn once, in the colours of the light theme (:data:`THEME`); inside a page each of them becomes the variable
of the style sheet that has this colour there, so that the same drawing is right in the dark.
"""

from __future__ import annotations

import re

from mgm_exp.page.html import Html, escape

THEME = {
    "ink": "#1c2024",
    "soft": "#667079",
    "line": "#dfe3e8",
    "card": "#ffffff",
    "a": "#2f6fde",
    "b": "#e0662d",
    "c": "#1f9d78",
    "d": "#8a5cd6",
    "e": "#c99a06",
    "faint": "#cbdcf8",
}
"""Colours of the light theme by the name of their variable. A plot that uses others is shown in those."""

_DECLARATION = re.compile(r"<\?xml.*?\?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>|<!--.*?-->", re.DOTALL)
_SIZE = re.compile(r'(<svg\b[^>]*?)\s(?:width|height)="[^"]*"')
_FONT = re.compile(r"font:\s*(?:\d+\s+)?([\d.]+px)[^;\"]*")
_ALLOWED = frozenset(
    "svg g path defs clippath rect use style text tspan title desc circle line polyline polygon marker".split()
)
_TAG = re.compile(r"<\s*/?\s*([A-Za-z][\w:.-]*)")
_DANGEROUS = re.compile(r"\bon\w+\s*=|javascript:|(?:href|src)\s*=\s*[\"'](?!#)|url\(\s*[\"']?(?!#)", re.IGNORECASE)


def inline_svg(drawing: str, label: str) -> Html:
    """A drawing as a part of a page.

    Args:
        drawing: SVG as matplotlib writes it, with text as text (``svg.fonttype: none``).
        label: What it shows, for those who do not see it.

    Raises:
        ValueError: it holds elements that load or run something; plots of ours have none.
    """
    text = _DECLARATION.sub("", drawing).strip()
    found = {name.lower() for name in _TAG.findall(text)} - _ALLOWED
    if found or _DANGEROUS.search(text):
        raise ValueError(f"an SVG drawing may not hold {', '.join(sorted(found)) or 'scripts or links'}")
    for _ in range(2):  # width and height: the page decides
        text = _SIZE.sub(r"\1", text, count=1)
    text = _FONT.sub(r"font-size: \1; font-family: inherit", text)
    for name, colour in THEME.items():
        text = re.sub(re.escape(colour), f"var(--{name})", text, flags=re.IGNORECASE)
    return Html(text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))
