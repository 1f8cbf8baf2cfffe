"""``metrics.jsonl``: one flushed line an optimizer step, cut back to the checkpoint's step on resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mgm_exp.store import parse_record, read_text, write_atomic


class MetricsFile:
    """Appends rows; a row that is not an optimizer step carries the key ``event``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def cut_back(self, step: int, rollbacks: int = 0) -> list[dict[str, Any]]:
        """Drops everything after ``step`` (and a torn last line); returns the rows that stay.

        Args:
            rollbacks: How many the checkpoint knows of. A later one, which stands at the step that it went back to, was
                killed before it was saved: it happens again.
        """
        rows = read_rows(self.path)
        kept = [row for row in rows if row["step"] <= step and row.get("rollback", 0) <= rollbacks]
        write_atomic(self.path, "".join(_line(row) for row in kept))
        return kept

    def append(self, row: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(_line(row))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a metrics file; a torn last line (a kill in mid-write) is left out."""
    if not path.exists():
        return []
    *lines, torn = read_text(path).split("\n")
    del torn
    return [parse_record(line) for line in lines]


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
