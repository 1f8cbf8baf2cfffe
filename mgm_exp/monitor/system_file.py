"""``system.jsonl`` of a run folder: samples of the machine, bounded in size, continued by a run that is resumed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from mgm_exp.store import parse_record, write_atomic

NAME = "system.jsonl"
# About 7 MB with one GPU. A file that is full is thinned to every second line and those where a stage or a process
# begins, and fills at half the rate from there.
MOST_LINES = 16_384


class SystemFile:
    """Appends samples, each as one line, in one write.

    Args:
        path: The file; lines that an earlier process left are kept, but for one that it left unfinished.
        most_lines: When it is thinned.
    """

    def __init__(self, path: Path, most_lines: int = MOST_LINES) -> None:
        self.path, self._most = path, most_lines
        lines = list(_whole_lines(path))
        if path.exists() and path.read_bytes() != b"".join(lines):
            write_atomic(path, b"".join(lines).decode())
        self._lines, self._stride, self._seen = len(lines), 1, 0
        self._stream: IO[bytes] | None = None

    def append(self, sample: Mapping[str, Any]) -> None:
        """Takes a sample, which is written unless the file was thinned and it is not its turn."""
        self._seen += 1
        if self._seen % self._stride:
            return
        if self._lines >= self._most:
            self._thin()
        if self._stream is None:
            self._stream = self.path.open("ab", buffering=0)  # what a full disk refused is not tried again on closing
        self._stream.write(json.dumps(sample, separators=(",", ":")).encode() + b"\n")
        self._lines += 1

    def _thin(self) -> None:
        self.close()
        lines = list(_whole_lines(self.path))
        stages = [_stage_of(line) for line in lines]
        # Where a stage or a process begins is kept: a pause between two attempts stays one.
        kept = [line for place, line in enumerate(lines) if place % 2 == 0 or stages[place] != stages[place - 1]]
        write_atomic(self.path, b"".join(kept).decode())
        self._lines, self._stride = len(kept), self._stride * 2

    def close(self) -> None:
        """Closes the file; appending opens it again."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The samples of a file; none where it is not there."""
    found = []
    for line in _whole_lines(path):
        with contextlib.suppress(ValueError):
            sample = parse_record(line)
            if isinstance(sample, dict) and isinstance(sample.get("t"), (int, float)):
                found.append(sample)
    return found


def _stage_of(line: bytes) -> str | None:
    with contextlib.suppress(ValueError):
        sample = parse_record(line)
        if isinstance(sample, dict) and isinstance(stage := sample.get("stage"), str):
            return stage
    return None


def _whole_lines(path: Path) -> Iterator[bytes]:
    if path.exists():
        with path.open("rb") as file:
            yield from (line for line in file if line.endswith(b"\n"))
