"""What curation found: the account of every row, as it stands in ``report.json``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
REPORT = "report.json"


@dataclass(frozen=True)
class StageReport:
    """What became of one stage's rows.

    Args:
        file: Name of the source file.
        image_root: Absolute folder of the images.
        rows: Rows read; those that were kept, rejected or dropped are all of them.
        kept: Records written, those of augmentation included.
        dropped: Number of rows that each operator of the recipe dropped.
        limits: The recipe's limits as numbers, for each value: ``{words_num: {min: 4}}``.
        waterfall: What became of the rows, step by step (:meth:`mgm_exp.data.fates.Fates.waterfall`).
        text: Statistics of the answers that are learnt, without copies
            (:func:`mgm_exp.data.exploration.text_statistics`).
        raw_text: The same of the captions as they were found, for the same rows; None where none was replaced.
        rejected: Number of rows for each kind of rejection.
        changed: Number of kept rows for each kind of change (see :mod:`mgm_exp.data.conversations`); ``recaptioned``:
            rows that bring a ``raw_caption``.
        images: Different images among the kept records.
        max_length: Longest sequence.
        truncated: Kept records that are longer and lose their end.
        supervised_tokens: Tokens that are learnt in one pass over the records.
        tokens: Tokens of all sequences after truncation, image tokens included.
        lengths: Of the sequences before truncation, image tokens included: mean, p50, p90, p95, p99, max.
        fingerprint: SHA-256 over records and image files.
    """

    file: str
    image_root: str
    rows: int
    kept: int
    dropped: dict[str, int]
    limits: dict[str, Any]
    waterfall: list[dict[str, Any]]
    text: dict[str, Any]
    raw_text: dict[str, Any] | None
    rejected: dict[str, int]
    changed: dict[str, int]
    images: int
    max_length: int
    truncated: int
    supervised_tokens: int
    tokens: int
    lengths: dict[str, float]
    fingerprint: str


@dataclass(frozen=True)
class CurationReport:
    """What became of all rows; ``report.json``."""

    stages: dict[str, StageReport] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all stages: equal for equal records and images, wherever they lie."""
        parts = [f"{name} {stage.fingerprint}" for name, stage in sorted(self.stages.items())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Plain values: ``schema_version``, ``fingerprint`` and one object for each stage."""
        stages = {name: dict(vars(stage)) for name, stage in self.stages.items()}
        return {"schema_version": SCHEMA_VERSION, "fingerprint": self.fingerprint, **stages}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> CurationReport:
        """The inverse of :meth:`to_json`."""
        return cls({name: StageReport(**value) for name, value in values.items() if isinstance(value, dict)})


def read_report(folder: Path) -> CurationReport:
    """The report of a curated folder."""
    return CurationReport.from_json(json.loads((folder / REPORT).read_text(encoding="utf-8")))
