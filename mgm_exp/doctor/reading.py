"""Logs as bounded lists of plain lines: head and tail of a file of any size, whatever bytes it holds."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# What is read of a log: its beginning says what was started, its end how it ended.
HEAD_BYTES, TAIL_BYTES = 256 << 10, 1 << 20
# Of a longer line (a progress bar of a whole night, a dumped tensor) the beginning and the end are kept.
LONGEST_LINE = 2000
_KEPT_END = 500
# Line ends of a longer file are not counted: places are then given from the end.
COUNTED_BYTES = 256 << 20
# Every line that this room prints into a run's log begins so, and is not read as a symptom afterwards.
OWN_WORDS = "doctor: "

# As log.txt is written: CSI and OSC sequences, other escapes; then what is left of control characters.
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]{0,32}[ -/]{0,8}[@-~]|\][^\x07\x1b]{0,512}(?:\x07|\x1b\\)|[@-Z\\^_=>])")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Line:
    """One line of a log.

    Args:
        source: Name of the file, or ``the text``.
        number: From 1; negative: so many lines before the end, of a file too long to be counted.
        text: Without escapes, at most :data:`LONGEST_LINE` characters.
    """

    source: str
    number: int
    text: str

    @property
    def place(self) -> str:
        """``log.txt:120``."""
        return f"{self.source}:{self.number}" if self.number > 0 else f"{self.source}:{self.number} from its end"


def read_log(path: Path, name: str, head_bytes: int = HEAD_BYTES, tail_bytes: int = TAIL_BYTES) -> list[Line]:
    """The first and the last lines of a file.

    Args:
        path: A plain file.
        name: How its lines are called.
        head_bytes, tail_bytes: How much is read.

    Raises:
        OSError: it is not there, or may not be read.
        ValueError: it is a pipe or a device.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise ValueError(f"{path} is no plain file")
        size = facts.st_size
        if size <= head_bytes + tail_bytes:
            return lines_of(_text(file.read(head_bytes + tail_bytes)), name)
        head = _whole_lines(file.read(head_bytes), at_end=True)
        file.seek(size - tail_bytes)
        tail = _whole_lines(file.read(tail_bytes), at_end=False)
        found = lines_of(_text(head), name)
        texts = _split(_text(tail))
        first = -len(texts)
        if size <= COUNTED_BYTES:
            file.seek(0)
            first = _line_ends(file, size - len(tail)) + 1
        return found + list(_lines(texts, name, first))


def lines_of(text: str, name: str) -> list[Line]:
    """The lines of a text that is there already."""
    return list(_lines(_split(text), name, 1))


def _lines(texts: list[str], name: str, first: int) -> Iterator[Line]:
    for number, text in enumerate(texts, first):
        plain = plain_line(text)
        if plain and not plain.startswith(OWN_WORDS):
            yield Line(name, number, plain)


def plain_line(text: str) -> str:
    """A line as a terminal would show it in the end: without escapes, and of a moving bar its last state."""
    if len(text) > LONGEST_LINE:
        text = f"{text[: LONGEST_LINE - _KEPT_END]} ... {text[-_KEPT_END:]}"
    text = _ESCAPES.sub("", text.rstrip("\r\n"))
    if "\r" in text:
        text = text[text.rfind("\r") + 1 :]
    return _CONTROL.sub("", text).rstrip()


def shown(text: str) -> str:
    """A text for a terminal: names and values in it may be of files that others wrote, and hold no escapes then."""
    return "\n".join(map(plain_line, text.split("\n")))


def _split(text: str) -> list[str]:
    lines = text.split("\n")
    return lines[:-1] if lines and not lines[-1] else lines


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def _whole_lines(raw: bytes, *, at_end: bool) -> bytes:
    """Without the line that was cut in two, unless it is all there is."""
    cut = raw.rfind(b"\n") if at_end else raw.find(b"\n")
    if cut < 0 or (not at_end and cut == len(raw) - 1):
        return raw
    return raw[: cut + 1] if at_end else raw[cut + 1 :]


def _line_ends(file: object, until: int) -> int:
    """How many lines end in the first ``until`` bytes."""
    count, left = 0, until
    while left > 0:
        block = file.read(min(left, 1 << 20))  # type: ignore[attr-defined]
        if not block:
            break
        count, left = count + block.count(b"\n"), left - len(block)
    return count
