"""``metrics.jsonl``: the source of truth of what happened in training, one flushed line a step; and
``quarantine.jsonl``: the batches that were in trouble, by the ids of their samples."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from mgm_exp.record.recorder import Row, RunInfo, Sink
from mgm_exp.store import disk_full_named, write_atomic


class FilesSink(Sink):
    """Writes the rows of every stage to ``metrics.jsonl`` in the run folder.

    A line is in the hands of the operating system before :meth:`row` returns, so ``kill -9`` loses none; only a power
    cut can lose the last ones. When a stage starts again, its old lines are replaced by the ones that still hold, in
    one atomic step: rows that were computed after the checkpoint are computed again, not recorded twice.
    """

    essential = True

    def __init__(self, run_dir: Path) -> None:
        self.path = Path(run_dir) / "metrics.jsonl"
        self._stream: IO[str] | None = None
        self.quarantine = Quarantine(Path(run_dir) / "quarantine.jsonl")

    def start(self, run: RunInfo) -> None:
        """Makes sure that the file is there, also for a run in which nothing is trained."""
        self._append()

    def stage_started(self, stage: str, total_steps: int, rows: Sequence[Row]) -> None:
        """Drops the old lines of ``stage`` and writes ``rows`` in their place, after the lines of other stages."""
        self._close()
        kept = [line for line, row in _lines(self.path) if row.get("stage") != stage]
        kept += [json_line(row) for row in rows]
        write_atomic(self.path, "".join(line + "\n" for line in kept))
        for row in rows:
            self.quarantine.note(row)
        self._append()

    def row(self, row: Row) -> None:
        """Appends one line.

        Raises:
            DiskFullError: no space is left; the lines before it are whole.
        """
        line = json_line(row) + "\n"
        with disk_full_named(self.path, len(line)):
            stream = self._append()
            stream.write(line)
            stream.flush()
        self.quarantine.note(row)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Closes the file."""
        self._close()

    def _append(self) -> IO[str]:
        if self._stream is None:
            self._stream = self.path.open("a", encoding="utf-8", newline="\n")
        return self._stream

    def _close(self) -> None:
        if self._stream is not None:
            with disk_full_named(self.path):
                self._stream.close()
            self._stream = None


class Quarantine:
    """One line for each batch that a guard named: its samples, its numbers, why, and what was done.

    Steps that are computed again after a kill name the same batch again: it stands here once. A batch that a roll-back
    took out of ``metrics.jsonl`` stays.
    """

    KEYS = ("stage", "step", "batch", "reason", "action", "detail", "loss", "grad_norm", "sample_ids")

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: set[tuple[Any, ...]] | None = None

    def note(self, row: Row) -> None:
        """Takes a row of ``metrics.jsonl`` in; those that name no batch are passed over."""
        if "sample_ids" not in row or "reason" not in row:
            return
        if self._known is None:
            self._known = {self._key(known) for _, known in _lines(self.path)}
        if self._key(row) in self._known:
            return
        self._known.add(self._key(row))
        line = json_line(
            {key: row.get("from_step", row.get(key)) if key == "step" else row.get(key) for key in self.KEYS}
        )
        with disk_full_named(self.path, len(line)), self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(line + "\n")

    @staticmethod
    def _key(row: Row) -> tuple[Any, ...]:
        return row.get("stage"), row.get("batch"), row.get("reason")


def json_line(row: Row) -> str:
    """A row as one line of strict JSON.

    JSON knows no NaN: such a number becomes ``null`` and its true value stands in ``non_finite``, so that every parser
    reads the line and nobody takes a NaN loss for a missing one.
    """
    broken = {key: str(value) for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    if broken:
        row = {**row, **dict.fromkeys(broken), "non_finite": broken}
    return json.dumps(row, ensure_ascii=False, allow_nan=False, default=str)


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The whole lines of a file; what a kill left half-written is passed over."""
    if not path.exists():
        return
    for raw in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(raw)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield os.fsdecode(raw), row
