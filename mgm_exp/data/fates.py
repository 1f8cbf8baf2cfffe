"""What became of every row: kept, changed, added, or dropped by which step with which value.

``fates-<stage>.jsonl`` has one line a row, in order::

    {"id": "7", "fate": "changed", "step": "kept", "changes": ["recaptioned"]}
    {"id": "8", "fate": "dropped", "step": "words_num", "value": 3, "limit": "min 4", "line": 9}
    {"id": "9", "fate": "dropped", "step": "images", "kind": "missing", "detail": "9.jpg is not there", "line": 10}

The waterfall adds them up, and a few rows of each step are kept as examples, chosen by a hash of their id, so that the
same data shows the same examples.
"""

from __future__ import annotations

import hashlib
import heapq
import os
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mgm_exp.data.kinds import FILE_KINDS, IMAGE_KINDS, ROW_KINDS
from mgm_exp.data.recipe import Drop, Limits
from mgm_exp.data.records import BadRow, Record, json_line

EXAMPLES_FILE = "examples.json"
EXAMPLES = 8
"""Rows that are kept of each step for the gallery."""

_UNTRAINABLE = (
    "no_label",
    "labels_truncated",
    "image_truncated",
    "special_token",
    "no_boundary",
    "unsupported_row",
)


def step_of(kind: str) -> str:
    """The step of the waterfall at which a kind of rejection happens."""
    if kind in _UNTRAINABLE:
        return "trainable"
    if kind in IMAGE_KINDS:
        return "images"
    assert kind in FILE_KINDS or kind in ROW_KINDS, kind
    return "rows"


@dataclass(frozen=True)
class Example:
    """One row for the gallery.

    Args:
        id: Its id.
        image: Path below the image root; None for text.
        before: The caption as it was found.
        after: The caption that is trained on, or would be; None where the row was dropped with its own.
        note: What happened, in words.
    """

    id: str
    image: str | None
    before: str
    after: str | None
    note: str


@dataclass
class _Sample:
    """The rows whose ids have the smallest hashes."""

    rows: list[tuple[int, int, Example]] = field(default_factory=list)

    def add(self, number: int, example: Example) -> None:
        digest = int.from_bytes(hashlib.sha256(example.id.encode("utf-8", "replace")).digest()[:8], "big")
        entry = (-digest, -number, example)
        if len(self.rows) < EXAMPLES:
            heapq.heappush(self.rows, entry)
        elif entry[:2] > self.rows[0][:2]:
            heapq.heapreplace(self.rows, entry)

    def examples(self) -> list[Example]:
        return [example for _, _, example in sorted(self.rows, key=lambda entry: entry[:2], reverse=True)]


class Fates:
    """Writes the fates of one stage's rows, and counts them.

    Args:
        path: The file; it is there, whole, once the block has ended without an error.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: Counter[str] = Counter()
        self.dropped_by: Counter[str] = Counter()
        self.rejected_at: dict[str, Counter[str]] = {"rows": Counter(), "images": Counter(), "trainable": Counter()}
        self._samples: dict[str, _Sample] = {}
        self._number = 0

    def __enter__(self) -> Fates:
        self._partial = self.path.with_name(f"{self.path.name}.partial")
        self._file = open(self._partial, "w", encoding="utf-8", newline="\n")
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._file.close()
        if kind is None:
            os.replace(self._partial, self.path)

    @property
    def n_dropped(self) -> int:
        """Rows that the recipe dropped."""
        return self.dropped_by.total()

    def rejected(self, bad: BadRow, record: Record | None = None) -> None:
        """A row that cannot be used."""
        step = step_of(bad.kind)
        self.rejected_at[step][bad.kind] += 1
        self._line(bad.id, "dropped", step, kind=bad.kind, detail=bad.detail, line=bad.line)
        if record is not None:
            self._sample(step, record, None, f"{bad.kind}: {bad.detail}")

    def dropped(self, record: Record, drop: Drop, line: int, said: dict[str, Any] | None = None) -> None:
        """A pair that the recipe does not allow; ``said``: what recaptioning noted about it."""
        self.dropped_by[drop.operator] += 1
        more = {"recaption": said} if said else {}
        self._line(record.id, "dropped", drop.operator, value=drop.value, limit=drop.limit, line=line, **more)
        self._sample(drop.operator, record, None, f"{drop.value:g}; allowed: {drop.limit}")

    def kept(self, record: Record, changes: list[str], said: dict[str, Any] | None = None) -> None:
        """A row that is trained on; ``said``: what recaptioning noted about it."""
        more = ({"changes": changes} if changes else {}) | ({"recaption": said} if said else {})
        self._line(record.id, "changed" if changes else "kept", "kept", **more)
        self._sample("changed" if "recaptioned" in changes else "kept", record, record, "")

    def added(self, record: Record, changes: list[str]) -> None:
        """A row that augmentation made out of the one before it."""
        self._line(record.id, "added", "augment", changes=changes)
        self._sample("augment", record, record, ", ".join(changes))

    def waterfall(self, rows: int, recaptioned: int | None, new_rows: int, limits: Limits) -> list[dict[str, Any]]:
        """The steps in their order: ``{step, rows_in, dropped, changed, added, rows_out, kinds?, limit?}``.

        Args:
            rows: Rows of the source.
            recaptioned: Rows whose caption was replaced; None: nothing was recaptioned.
            new_rows: Rows that recaptioning added.
            limits: The recipe's.
        """
        steps: list[dict[str, Any]] = []
        left = rows

        def step(name: str, dropped: int = 0, changed: int = 0, added: int = 0, **more: Any) -> None:
            nonlocal left
            out = left - dropped + added
            counts = {"rows_in": left, "dropped": dropped, "changed": changed, "added": added, "rows_out": out}
            steps.append({"step": name, **counts, **more})
            left = out

        for name in ("rows", "images"):
            step(name, self.rejected_at[name].total(), kinds=dict(sorted(self.rejected_at[name].items())))
        if recaptioned is not None:
            step("recaption", changed=recaptioned, added=new_rows)
        for operator in dict.fromkeys(bound.operator for bound in limits.bounds):
            words = ", ".join(bound.in_words() for bound in limits.bounds if bound.operator == operator)
            step(operator, self.dropped_by[operator], limit=words)
        at = self.rejected_at["trainable"]
        step("trainable", at.total(), kinds=dict(sorted(at.items())))
        if self.counts["added"]:
            step("augment", added=self.counts["added"])
        return steps

    def examples(self) -> dict[str, list[dict[str, Any]]]:
        """A few rows of each step, as plain values of :class:`Example`."""
        return {step: [asdict(example) for example in sample.examples()] for step, sample in self._samples.items()}

    def _line(self, row_id: str | None, fate: str, step: str, **more: Any) -> None:
        self.counts[fate] += 1
        self._file.write(json_line({"id": row_id, "fate": fate, "step": step, **more}))

    def _sample(self, step: str, record: Record, after: Record | None, note: str) -> None:
        self._number += 1
        said = record.conversations[-1].text
        is_new = record.raw_caption is not None
        before = record.raw_caption if is_new else said
        example = Example(record.id, record.image, before or "", said if after or is_new else None, note)
        self._samples.setdefault(step, _Sample()).add(self._number, example)
