"""JSON from outside, read row by row, strictly and within limits.

Python's parser accepts NaN, infinite numbers, repeated keys and lone surrogates, and gives up on a whole file for one
fault. Here a fault costs its own row, which is named, and the next row is read. A file larger than memory is no
problem: both readers keep one row and one block in memory.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

MAX_ROW_BYTES = 4 << 20
MAX_NESTING = 32
_BLOCK = 1 << 20
_LOOKAHEAD = 1 << 16

_BLANK = re.compile(r"[ \t\n\r]*")
# A whole string, or one character that gives structure; a lone quote opens a string that does not end.
_STRUCTURE = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{},]', re.DOTALL)
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Fault:
    """Why a piece of JSON is refused: a kind of :data:`mgm_exp.data.kinds.FILE_KINDS` and the detail."""

    kind: str
    detail: str


@dataclass(frozen=True)
class Element:
    """One row: where it begins and its value, or the fault that it has; and its image, where that lies beside it."""

    line: int
    index: int
    value: Any = None
    fault: Fault | None = None
    image: str | None = None


class _Refused(ValueError):
    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.fault = Fault(kind, detail)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _Refused("duplicate_key", f"the key {_short(twice)} stands twice in one object")
    return value


def _constant(word: str) -> Any:
    raise _Refused("bad_number", f"{word} is not a JSON number")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Refused("bad_number", f"{_short(text)} is too large for a number")
    return value


def _int(text: str) -> int:
    if len(text) > 400:
        raise _Refused("bad_number", f"a number of {len(text)} digits")
    return int(text)


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, parse_int=_int)


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "...")


def _is_nested_too_deep(text: str, limit: int = MAX_NESTING) -> bool:
    if text.count("{") + text.count("[") <= limit:
        return False
    depth = 0
    for match in _STRUCTURE.finditer(text):
        token = match.group()
        if token in "{[":
            depth += 1
            if depth > limit:
                return True
        elif token in "}]":
            depth -= 1
    return False


def _fault_of(error: Exception) -> Fault:
    if isinstance(error, _Refused):
        return error.fault
    if isinstance(error, RecursionError):
        return Fault("nested_too_deep", f"nested deeper than {MAX_NESTING} levels")
    if isinstance(error, json.JSONDecodeError):
        return Fault("not_json", f"{error.msg} at character {error.pos}")
    return Fault("not_json", str(error))


def _parse(text: str, max_nesting: int) -> Any:
    if _is_nested_too_deep(text, max_nesting):
        raise _Refused("nested_too_deep", f"nested deeper than {max_nesting} levels")
    value, end = _DECODER.raw_decode(text, _blank_end(text, 0))
    if _blank_end(text, end) != len(text):
        raise _Refused("not_json", f"text after the end of the row: {_short(text[end:].strip())}")
    return value


def fault_in(text: str, max_nesting: int = MAX_NESTING) -> tuple[Any, Fault | None]:
    """The value of one JSON text, or the fault that it has."""
    try:
        return _parse(text, max_nesting), None
    except (ValueError, RecursionError) as error:
        return None, _fault_of(error)


def _blank_end(text: str, start: int) -> int:
    match = _BLANK.match(text, start)
    return match.end() if match else start


class LineElements(Iterator[Element]):
    """The rows of a JSON-lines file; lines without a character are no rows.

    Attributes:
        bytes_read: How far the file has been read.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._line = 0
        self._index = 0
        self.bytes_read = 0

    def _read_line(self) -> tuple[bytes, bool]:
        """The next line, and whether it was too long (then it is cut and the rest skipped)."""
        raw = self._file.readline(MAX_ROW_BYTES + 1)
        self.bytes_read += len(raw)
        is_long = len(raw) > MAX_ROW_BYTES and not raw.endswith(b"\n")
        rest = raw
        while is_long and rest and not rest.endswith(b"\n"):
            rest = self._file.readline(_BLOCK)
            self.bytes_read += len(rest)
        return raw, is_long

    def __next__(self) -> Element:
        while True:
            raw, is_long = self._read_line()
            if not raw:
                raise StopIteration
            self._line += 1
            if self._line == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            if is_long or raw.strip():
                break
        line, index = self._line, self._index
        self._index += 1
        if is_long:
            return Element(line, index, fault=Fault("row_too_large", f"longer than {MAX_ROW_BYTES} bytes"))
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            return Element(line, index, fault=Fault("encoding", f"byte {error.start + 1} is not UTF-8"))
        value, fault = fault_in(text)
        return Element(line, index, value, fault)


class ListElements(Iterator[Element]):
    """The rows of a file that holds one JSON list.

    A row is parsed where it stands; if that fails, its end is looked for by counting brackets, so that the row can be
    named and the next one read. A list that does not end gives one last element of the kind ``file_ends_early``.

    Attributes:
        bytes_read: How far the file has been read.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        # Bytes that are not UTF-8 become lone surrogates here and are found again in their row.
        self._decode = codecs.getincrementaldecoder("utf-8-sig")(errors="surrogateescape").decode
        self._text = ""
        self._at = 0
        self._line = 1
        self._index = 0
        self._is_whole = False
        self._is_done = False
        self.bytes_read = 0
        self._skip_blank()
        self._move(self._at + 1)  # the bracket that opens the list

    def _fill(self) -> bool:
        """Reads as much again as is held, one block at least; False at the end of the file."""
        if self._is_whole:
            return False
        # Doubling: a row that is looked at again and again until its end is in sight costs twice its size in all.
        raw = self._file.read(max(_BLOCK, len(self._text) - self._at))
        self.bytes_read += len(raw)
        self._is_whole = not raw
        self._text = self._text[self._at :] + self._decode(raw, final=not raw)
        self._at = 0
        return True

    def _move(self, to: int) -> None:
        self._line += self._text.count("\n", self._at, to)
        self._at = to

    def _skip_blank(self) -> None:
        while True:
            self._move(_blank_end(self._text, self._at))
            if self._at < len(self._text) or not self._fill():
                return

    def _next_character(self) -> str:
        self._skip_blank()
        return self._text[self._at : self._at + 1]

    def __next__(self) -> Element:
        if self._is_done:
            raise StopIteration
        character = self._next_character()
        if character == "]":
            self._move(self._at + 1)
            self._is_done = True
            if self._next_character():
                return self._element(self._line, Fault("not_json", "text after the end of the list"))
            raise StopIteration
        if not character:
            return self._ends_early(self._line)
        while len(self._text) - self._at < _LOOKAHEAD and self._fill():
            pass
        return self._read_element()

    def _element(self, line: int, fault: Fault | None, value: Any = None) -> Element:
        self._index += 1
        return Element(line, self._index - 1, value, fault)

    def _ends_early(self, line: int) -> Element:
        self._is_done = True
        return self._element(
            line,
            Fault("file_ends_early", "the list of rows has no end: the file is cut, or a quote or bracket is missing"),
        )

    def _read_element(self) -> Element:
        line = self._line
        while True:
            value, end, fault = self._try()
            if fault is None:
                break
            end = self._find_end()
            if end is not None:
                fault = fault_in(self._text[self._at : end])[1] or fault
                break
            if len(self._text) - self._at > MAX_ROW_BYTES:
                if not self._skip_element():
                    return self._ends_early(line)
                return self._element(line, Fault("row_too_large", f"longer than {MAX_ROW_BYTES} bytes"))
            if not self._fill():
                return self._ends_early(line)
        assert end is not None
        text = self._text[self._at : end]
        if not text.isascii() and _SURROGATE.search(text):
            fault = Fault("encoding", "bytes that are not UTF-8")
        elif fault is None and len(text) > MAX_ROW_BYTES:
            fault = Fault("row_too_large", f"longer than {MAX_ROW_BYTES} bytes")
        elif fault is None and _is_nested_too_deep(text):
            fault = Fault("nested_too_deep", f"nested deeper than {MAX_NESTING} levels")
        self._move(end)
        if self._next_character() == ",":
            self._move(self._at + 1)
        return self._element(line, fault, value if fault is None else None)

    def _try(self) -> tuple[Any, int | None, Fault | None]:
        """The row that begins here, if it is valid and its end is seen."""
        try:
            value, end = _DECODER.raw_decode(self._text, self._at)
        except (ValueError, RecursionError) as error:
            return None, self._at, _fault_of(error)
        after = _blank_end(self._text, end)
        if after == len(self._text) and not self._is_whole:
            return None, end, Fault("not_json", "the row may go on")
        if self._text[after : after + 1] not in (",", "]", ""):
            return None, end, Fault("not_json", f"text after the row: {_short(self._text[after : after + 20])}")
        return value, end, None

    def _find_end(self) -> int | None:
        """Where the row that begins here ends, by its brackets and quotes; None where that is not in sight."""
        depth = 0
        for match in _STRUCTURE.finditer(self._text, self._at):
            token = match.group()
            if token == '"':
                return None
            if token in "{[":
                depth += 1
            elif depth == 0 and token in ",]":
                return match.start()
            elif token in "}]":
                depth = max(0, depth - 1)
        return None

    def _skip_element(self) -> bool:
        """Passes over a row that is too large to be held; False if the file ends first."""
        depth, in_string = 0, False
        while True:
            position = self._at
            while position < len(self._text):
                character = self._text[position]
                if in_string:
                    if character == "\\":
                        position += 1
                    elif character == '"':
                        in_string = False
                elif character == '"':
                    in_string = True
                elif character in "{[":
                    depth += 1
                elif depth == 0 and character in ",]":
                    self._move(position)
                    if character == ",":
                        self._move(position + 1)
                    return True
                elif character in "}]":
                    depth = max(0, depth - 1)
                position += 1
            overshoot = position - len(self._text)  # an escape whose second character is in the next block
            self._move(len(self._text))
            if not self._fill():
                return False
            self._at = min(overshoot, len(self._text))
