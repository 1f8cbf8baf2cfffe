"""HTML that cannot be injected into: text is escaped as it becomes part of an element; markup is a type of its own."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

_VOID = frozenset("br hr img input meta link wbr".split())
_NAME = re.compile(r"[a-z][a-z0-9-]*")
# What XML and HTML forbid even when escaped, and halves of surrogate pairs, which no file can hold.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
# Characters that turn the direction of what follows them; shown inside captions they could disturb a whole page.
_TURNING = re.compile("[\u202a-\u202e\u2066-\u2069]")


class Html(str):
    """Text that is markup already. Made by :func:`element` and :func:`join`; whoever calls it vouches for it."""

    __slots__ = ()


def escape(text: str) -> Html:
    """Any text as markup: what means something in HTML is escaped, characters that no page may hold become U+FFFD."""
    return Html(html.escape(_TURNING.sub("", _FORBIDDEN.sub("\ufffd", text)), quote=True))


def element(tag: str, *children: str, **attributes: str | int | float | bool | None) -> Html:
    """One element with its children in it.

    Args:
        tag: ``p``, ``td``, ...
        children: Texts, which are escaped, and markup.
        attributes: ``class_`` is class; ``data_key`` is data-key. None and False are left out, True has no value.
    """
    if not _NAME.fullmatch(tag):
        raise ValueError(f"{tag!r} is no name of an element")
    parts = [tag]
    for key, value in attributes.items():
        name = key.rstrip("_").replace("_", "-")
        if value is None or value is False:
            continue
        parts.append(name if value is True else f'{name}="{escape(str(value))}"')
    opening = f"<{' '.join(parts)}>"
    return Html(opening if tag in _VOID else f"{opening}{join(children)}</{tag}>")


def join(parts: Iterable[str], between: str = "") -> Html:
    """Texts and markup, one after the other."""
    return Html(escape(between).join(part if isinstance(part, Html) else escape(part) for part in parts))
