"""The texts of a row as they stand in its file, and how to change them there without touching anything else."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mgm_exp.data.formats import DJ_END, DJ_IMAGE
from mgm_exp.data.records import IMAGE_TOKEN

# Data-Juicer's own tokens in its own text: they are no part of what is said.
_DJ_TOKENS = re.compile("(" + "|".join(map(re.escape, (DJ_IMAGE, IMAGE_TOKEN, DJ_END))) + ")")

Change = tuple[str, str, "str | None"]
"""Where, before, after."""


def texts_in(given: Any) -> Iterator[tuple[str, str]]:
    """The texts of what should have been a row, as far as they can be found, each with the name of its place."""
    if not isinstance(given, dict):
        return
    for key in ("caption", "text", "raw_caption"):
        if isinstance(given.get(key), str):
            text = given[key]
            yield key, _DJ_TOKENS.sub(" ", text) if key == "text" else text
    for number, turn in enumerate(_turns(given)):
        for key in ("value", "content"):
            if isinstance(turn, dict) and isinstance(turn.get(key), str):
                yield f"turn {number}", turn[key]


def with_texts(given: Mapping[str, Any], change: Callable[[str], str | None]) -> tuple[dict[str, Any], list[Change]]:
    """A row with its texts changed, and the changes.

    Args:
        given: The row as it stands in its file, of any form.
        change: Gives the new text, the same text, or None where there is none; the old one stays there.
    """
    changed = dict(given)
    changes: list[Change] = []

    def changed_text(where: str, text: str) -> str:
        after = change(text)
        if after != text:
            changes.append((where, text, after))
        return text if after is None else after

    turns = _turns(given)
    if turns:
        key = "conversations" if given.get("conversations") is not None else "messages"
        changed[key] = [_with_turn(turn, f"turn {number}", changed_text) for number, turn in enumerate(turns)]
    elif isinstance(given.get("text"), str):
        parts = _DJ_TOKENS.split(given["text"])  # text, token, text, token, ...
        changed["text"] = "".join(
            part if place % 2 or not part.strip() else changed_text("caption", part) for place, part in enumerate(parts)
        )
    elif isinstance(given.get("caption"), str):
        changed["caption"] = changed_text("caption", given["caption"])
    if isinstance(given.get("raw_caption"), str):
        changed["raw_caption"] = changed_text("raw_caption", given["raw_caption"])
    return changed, changes


def _turns(given: Mapping[str, Any]) -> list[Any]:
    turns = given.get("conversations") if given.get("conversations") is not None else given.get("messages")
    return turns if isinstance(turns, list) else []


def _with_turn(turn: Any, where: str, changed_text: Callable[[str, str], str]) -> Any:
    if not isinstance(turn, dict):
        return turn
    keys = [key for key in ("value", "content") if isinstance(turn.get(key), str)]
    return {**turn, **{key: changed_text(where, turn[key]) for key in keys}}
