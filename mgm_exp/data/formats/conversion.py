"""Writes whole files of rows, with a list beside them of every row that could not be written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from mgm_exp.data.formats.rows import Row
from mgm_exp.data.formats.writing import RowWriter
from mgm_exp.data.kinds import FATAL_KINDS
from mgm_exp.data.records import BadRow, json_line
from mgm_exp.errors import DataError
from mgm_exp.store import disk_full_named


@dataclass(frozen=True)
class WriteReport:
    """What became of the rows that were to be written.

    Args:
        rows: Rows read.
        written: Rows written; all others are in ``rejected``.
        images: Images written, into shards or out of them.
        rejected: Number of rows for each kind of rejection.
        rejected_file: JSON lines with each of them, its place and the reason; None where there are none.
    """

    rows: int
    written: int
    images: int
    rejected: dict[str, int] = field(default_factory=dict)
    rejected_file: Path | None = None


class RejectedFile:
    """Names every row that is left out; the file is there only if there are any.

    Args:
        path: JSON lines, written in place.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: Counter[str] = Counter()
        self.first: dict[str, BadRow] = {}
        path.unlink(missing_ok=True)

    def add(self, bad: BadRow) -> None:
        """Names a row.

        Raises:
            DataError: the kind is one after which nothing can be trusted (the file is cut).
        """
        self.counts[bad.kind] += 1
        self.first.setdefault(bad.kind, bad)
        with disk_full_named(self.path), open(self.path, "a", encoding="utf-8", newline="\n") as file:
            file.write(json_line(bad.to_json()))
        if bad.kind in FATAL_KINDS:
            raise DataError(f"The data cannot be trusted: {bad}.", advice="Get the whole file, or repair it.")

    def in_words(self) -> str:
        """How many of which kind, with the first place of each."""
        return "; ".join(
            f"{count} {kind} (first: {self.first[kind].place}: {self.first[kind].detail})"
            for kind, count in self.counts.most_common(4)
        )


def write_rows(
    rows: Iterable[Row | BadRow], writer: RowWriter, *, on_row: Callable[[int], None] | None = None
) -> WriteReport:
    """Writes rows to a file, and names beside it (``<out>.rejected.jsonl``) those that cannot be.

    Args:
        rows: As :func:`mgm_exp.data.formats.read_rows` gives them; with ``keep_given`` they come back as they stood.
        writer: Where to; it is published, or discarded if anything fails.
        on_row: Called with the number of rows that were read.

    Raises:
        DataError: no row is left; the source is cut; or see :meth:`RowWriter.write`.
    """
    rejected = RejectedFile(writer.out.with_name(f"{writer.out.name}.rejected.jsonl"))
    n_rows = 0
    with writer:
        for row in rows:
            n_rows += 1
            bad = row if isinstance(row, BadRow) else writer.write(row)
            if bad is not None:
                rejected.add(bad)
            if on_row is not None:
                on_row(n_rows)
        if not writer.rows:
            raise DataError(
                f"None of the {n_rows} rows can be written to {writer.out}: {rejected.in_words()}.",
                advice="If images are missing, give their folder with --images."
                if "missing" in rejected.counts
                else "",
            )
    counts = dict(sorted(rejected.counts.items()))
    return WriteReport(n_rows, writer.rows, writer.images, counts, rejected.path if counts else None)
