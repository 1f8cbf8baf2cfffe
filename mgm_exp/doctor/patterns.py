"""A regular expression of the knowledge base, and the words that every match of it must hold.

Looking for a word is some hundred times cheaper than looking for a pattern. With some two hundred patterns and a log
of a megabyte that decides whether a failed run can be looked at in passing.
"""

from __future__ import annotations

import re
from functools import cached_property

# Shorter words are in every log.
SHORTEST_WORD = 3
_QUANTIFIERS = "?*{"
_PLAIN = re.compile(r"[A-Za-z0-9 _/:,;<>=@%&'\"!#~-]")


class Pattern:
    """A pattern that is looked for in single lines, without regard to case.

    Args:
        text: The regular expression.

    Raises:
        re.error: it is none.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._expression = re.compile(text, re.IGNORECASE)

    def __repr__(self) -> str:
        return f"Pattern({self.text!r})"

    @cached_property
    def words(self) -> tuple[str, ...]:
        """Lower-case words of which every matching line has one; empty where that cannot be told."""
        found = [_longest_word(branch) for branch in _branches(self.text)]
        return tuple(found) if all(len(word) >= SHORTEST_WORD for word in found) else ()

    def may_be_in(self, lower: str) -> bool:
        """Whether a text (in lower case) can hold a match at all."""
        return not self.words or any(word in lower for word in self.words)

    def fits(self, text: str) -> re.Match[str] | None:
        """The match in one line."""
        return self._expression.search(text)


def _branches(text: str) -> list[str]:
    """The alternatives of the outermost level."""
    branches, depth, start, place = [], 0, 0, 0
    while place < len(text):
        char = text[place]
        if char == "\\":
            place += 2
            continue
        if char == "[":
            place = _after_class(text, place)
            continue
        depth += (char == "(") - (char == ")")
        if char == "|" and depth == 0:
            branches.append(text[start:place])
            start = place + 1
        place += 1
    return [*branches, text[start:]]


def _after_class(text: str, place: int) -> int:
    """Where ``[...]`` ends."""
    place += 1
    if text[place : place + 1] == "^":
        place += 1
    if text[place : place + 1] == "]":
        place += 1
    while place < len(text) and text[place] != "]":
        place += 2 if text[place] == "\\" else 1
    return place + 1


def _longest_word(branch: str) -> str:
    """The longest run of plain characters that every match of an alternative must hold."""
    runs, run, depth, place = [""], "", 0, 0
    while place < len(branch):
        char, step = branch[place], 1
        literal = ""
        if char == "\\":
            step = 2
            escaped = branch[place + 1 : place + 2]
            literal = "" if escaped.isalnum() else escaped
        elif char == "[":
            step = _after_class(branch, place) - place
        elif char == "{":
            step = max(1, branch.find("}", place) + 1 - place)
        elif char in "()":
            depth += 1 if char == "(" else -1
        elif _PLAIN.match(char):
            literal = char
        following = branch[place + step : place + step + 1]
        if following and following in _QUANTIFIERS:
            literal = ""
        if literal and depth == 0:
            run += literal
        else:
            runs.append(run)
            run = ""
        if following == "+" and run:
            runs.append(run)
            run = ""
        place += step
    return max([*runs, run], key=len).lower()
