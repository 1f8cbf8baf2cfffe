"""Records: one training sample each, as every stage after curation reads it.

On disk a record is one JSON line in LLaVA's form (``id``, ``image``, ``conversations`` of ``from``/``value``); a
caption that replaced another one keeps it beside itself as ``raw_caption``. A row that cannot become a record is a
:class:`BadRow`: it is named, with its place and the reason, and never replaced by something else.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from mgm_exp.errors import DataError

Speaker = Literal["human", "gpt"]
SPEAKERS: tuple[Speaker, ...] = ("human", "gpt")

IMAGE_TOKEN = "<image>"
"""Stands in a human turn where the image belongs."""


# Line ends for Unicode, and for Python, that JSON does not escape. They can only stand inside a text.
_SEPARATORS = {"\u0085": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}


@dataclass(frozen=True)
class Turn:
    """What one side says."""

    speaker: Speaker
    text: str


@dataclass(frozen=True)
class Record:
    """One sample.

    Args:
        id: Unique in its file.
        image: Path relative to the image root; None for a text-only sample.
        conversations: Turns, human first, then in turn.
        raw_caption: The caption that the answer replaced; None where nothing was replaced.
    """

    id: str
    image: str | None
    conversations: tuple[Turn, ...]
    raw_caption: str | None = None

    def turns(self) -> list[dict[str, str]]:
        """The conversation as a processor takes it: ``[{"from": "human", "value": ...}, ...]``."""
        return [{"from": turn.speaker, "value": turn.text} for turn in self.conversations]

    def words(self) -> int:
        """Words of all turns: the length that the official sampler groups by."""
        return sum(len(turn.text.split()) for turn in self.conversations)

    def to_json(self) -> dict[str, Any]:
        """The record as a LLaVA row; keys that hold nothing are left out."""
        row: dict[str, Any] = {"id": self.id}
        if self.image is not None:
            row["image"] = self.image
        row["conversations"] = self.turns()
        if self.raw_caption is not None:
            row["raw_caption"] = self.raw_caption
        return row

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Record:
        """The inverse of :meth:`to_json`. Raises KeyError or TypeError for anything else."""
        turns = tuple(Turn(turn["from"], turn["value"]) for turn in row["conversations"])
        return cls(row["id"], row.get("image"), turns, row.get("raw_caption"))


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why.

    Args:
        file: Name of the file that it stands in.
        line: Line of the file on which it begins, counted from 1.
        id: Its id, where one could be read.
        kind: One of :data:`mgm_exp.data.kinds.KINDS`.
        detail: What exactly was found, in words.
        index: Number of the row in its file, counted from 0.
        given: What stands in the file, where it is JSON and the reader was asked to keep it; not written out.
    """

    file: str
    line: int
    id: str | None
    kind: str
    detail: str
    index: int = 0
    given: Any = field(default=None, compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "line": self.line,
            "index": self.index,
            "id": self.id,
            "kind": self.kind,
            "detail": self.detail,
        }

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> BadRow:
        return cls(row["file"], row["line"], row["id"], row["kind"], row["detail"], row["index"])

    @property
    def place(self) -> str:
        """Where it stands, in words."""
        name = f" (id {self.id})" if self.id is not None else ""
        return f"{self.file}, line {self.line}, row {self.index}{name}"

    def __str__(self) -> str:
        return f"{self.place}: {self.kind}: {self.detail}"


def json_line(value: dict[str, Any]) -> str:
    """One line of a JSON-lines file, with its line end; it is one line for every reader, also for ``splitlines``."""
    line = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if not line.isascii():
        for separator, escape in _SEPARATORS.items():
            line = line.replace(separator, escape)
    return line + "\n"


def write_records(path: Path, records: Iterable[Record]) -> int:
    """Writes records as JSON lines. Returns their number. The caller makes the folder atomic (a store entry)."""
    count = 0
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json_line(record.to_json()))
            count += 1
    return count


class RecordFile(Sequence[Record]):
    """The records of a curated file, read when they are asked for.

    Only the places of the lines are kept in memory (8 bytes a record), so that a million records cost a training
    process, and every loader process beside it, almost nothing.

    Args:
        path: JSON lines as :func:`write_records` writes them.

    Raises:
        DataError: the file is missing, or a line of it is no record (on access).
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            content = self._map()
        except FileNotFoundError:
            raise DataError(f"The records {self.path} are not there.", advice="Run the curate stage again.") from None
        starts = [0]
        if content is not None:
            position = content.find(b"\n")
            while position >= 0:
                starts.append(position + 1)
                position = content.find(b"\n", position + 1)
            if starts[-1] != len(content):
                starts.append(len(content))
        self._starts = np.asarray(starts, dtype=np.int64)
        self._content = content

    def _map(self) -> mmap.mmap | None:
        with open(self.path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return None
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_starts": self._starts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._content = self._map()

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self) or self._content is None:
            raise IndexError(index)
        line = self._content[int(self._starts[index]) : int(self._starts[index + 1])]
        try:
            return Record.from_json(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"Line {index + 1} of {self.path} is no record ({error}).",
                advice="The file is written by the curate stage and not meant to be edited; run it again.",
            ) from error

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    def fingerprint(self) -> str:
        """SHA-256 of the file's bytes."""
        digest = hashlib.sha256()
        if self._content is not None:
            digest.update(self._content)
        return digest.hexdigest()


def read_records(path: Path | str) -> RecordFile:
    """The records of a curated file."""
    return RecordFile(path)
