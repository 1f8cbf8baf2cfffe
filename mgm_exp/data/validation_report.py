"""What validation found, as it is printed and as it stands in its JSON report."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from mgm_exp.data.records import BadRow, json_line
from mgm_exp.store import disk_full_named

SCHEMA_VERSION = 1

_SPOOL_BYTES = 8 << 20


@dataclass(frozen=True)
class ImageSummary:
    """The images that the rows name, each counted once.

    Args:
        checked: Images that were decoded, or found to be unusable.
        broken: Unusable ones among them.
        bytes: Of the files of the usable ones.
        formats, modes: Number of usable images for each of Pillow's formats and modes.
        unused: Image files that lie beside the named ones and are named by no row; None: there are too many folders.
        unused_examples: Paths of the first of them.
    """

    checked: int = 0
    broken: int = 0
    bytes: int = 0
    formats: Mapping[str, int] = field(default_factory=dict)
    modes: Mapping[str, int] = field(default_factory=dict)
    unused: int | None = 0
    unused_examples: tuple[str, ...] = ()


class FaultList(Iterable[BadRow]):
    """Faults in the order of the rows; beyond a few megabytes they lie in a temporary file, not in memory."""

    def __init__(self) -> None:
        self._lines = tempfile.SpooledTemporaryFile(_SPOOL_BYTES)  # noqa: SIM115 - lives as long as the list
        self._n = self._end = 0

    def append(self, fault: BadRow) -> None:
        """Adds one at the end."""
        with disk_full_named(tempfile.gettempdir()):
            self._lines.seek(self._end)
            self._lines.write(json_line(fault.to_json()).encode("utf-8", "surrogatepass"))
            self._end = self._lines.tell()
        self._n += 1

    def __len__(self) -> int:
        return self._n

    def __iter__(self) -> Iterator[BadRow]:
        place = 0
        while place < self._end:
            self._lines.seek(place)
            line = self._lines.readline()
            place += len(line)
            yield BadRow.from_json(json.loads(line))


@dataclass(frozen=True)
class ValidationReport:
    """What is wrong with a dataset.

    Args:
        path: The file of rows, or the folder of shards.
        image_root: Folder that image paths are relative to.
        rows: Rows of the file, readable or not.
        ok: Rows without any fault.
        broken: Every fault; several may be of one row.
        counts: For each kind, the number of rows that have it.
        first: For each kind, its first few faults.
        images: What is known of the images.
        seconds: How long it took.
    """

    path: Path
    image_root: Path
    rows: int
    ok: int
    broken: FaultList
    counts: Mapping[str, int]
    first: Mapping[str, tuple[BadRow, ...]]
    images: ImageSummary
    seconds: float

    def head(self) -> dict[str, Any]:
        """Everything but the faults, as plain values."""
        images = dict(vars(self.images))
        return {
            "schema_version": SCHEMA_VERSION,
            "path": os.fspath(self.path),
            "image_root": os.fspath(self.image_root),
            "rows": self.rows,
            "ok": self.ok,
            "counts": dict(self.counts),
            "images": {**images, "unused_examples": list(self.images.unused_examples)},
            "seconds": round(self.seconds, 3),
        }

    def write_json(self, path: Path) -> None:
        """Writes the whole report as one JSON object, streaming the faults; whole or not at all.

        Raises:
            DiskFullError: no space is left; the file then is as it was before.
        """
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with disk_full_named(path):
            try:
                with open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
                    self._write_to(file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise

    def _write_to(self, file: IO[str]) -> None:
        head = json.dumps(self.head(), ensure_ascii=False, indent=2)
        file.write(head.removesuffix("\n}") + ',\n  "broken": [')
        separator = "\n    "
        for fault in self.broken:
            file.write(separator + json_line(fault.to_json()).rstrip("\n"))
            separator = ",\n    "
        file.write("\n  ]\n}\n" if len(self.broken) else "]\n}\n")
