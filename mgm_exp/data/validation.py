"""Validation: every fault of every row and image of a dataset, with its place; nothing is left out.

    report = validate(find_source("pairs.jsonl"))
    report.ok == report.rows                      # or see report.counts and report.broken

A row is read strictly, its texts are searched for damage, and its image is decoded, whatever was found before: a row
with a broken turn, a damaged text and a missing image is reported three times. Whether a row fits a model's chat
template and longest sequence (``no_label``, ``labels_truncated``) is for curation, which knows the model.

The file is streamed. What grows with the data are 64-bit hashes of ids and image paths; faults are spooled to disk.
"""

from __future__ import annotations

import codecs
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from mgm_exp.data.conversations import row_faults
from mgm_exp.data.formats import Location, Row, read_rows
from mgm_exp.data.image_checks import ImageChecks, Verdict
from mgm_exp.data.records import BadRow
from mgm_exp.data.row_texts import texts_in
from mgm_exp.data.seen_images import SeenImages
from mgm_exp.data.text_faults import text_faults
from mgm_exp.data.validation_report import FaultList, ImageSummary, ValidationReport

MAX_MEGAPIXELS = 50.0

Progress = Callable[[str, int, int], None]

_CHUNK = 256  # rows that are read ahead and whose images are checked together
_AHEAD = 4  # chunks whose images are being checked
_TELL_EVERY = 32
_MOST_IMAGES = 16  # of a row that may name one: so many of them are looked at
_FIRST = 4  # faults of a kind that the report holds in memory


@dataclass(frozen=True)
class CheckedRow:
    """One row of a file and everything that is wrong with it.

    Args:
        row: The row; None where it cannot be read as one.
        faults: All of them, the row's own before its image's; empty: none.
        verdict: On its image; None where it names none.
    """

    row: Row | None
    faults: tuple[BadRow, ...]
    verdict: Verdict | None = None


def validate(
    source: Location,
    *,
    max_megapixels: float = MAX_MEGAPIXELS,
    workers: int | None = None,
    on_progress: Progress | None = None,
) -> ValidationReport:
    """Checks every row and every image.

    Args:
        source: Rows and images, see :func:`mgm_exp.data.find_source`.
        max_megapixels: Images with more pixels are faults, and are not decoded.
        workers: Processes that decode images; None: all usable cores, two at least. 0: this process.
        on_progress: Called with (what, rows done, rows in all); the latter is an estimate until the end.

    Raises:
        DataError: the rows cannot be read at all (no file, empty, not a known format); or a process that decodes images
            was killed.
    """
    validation = Validation(source, max_megapixels=max_megapixels, workers=workers, on_progress=on_progress)
    for _ in validation:
        pass
    return validation.report()


class Validation(Iterable[CheckedRow]):
    """One pass over a dataset that hands out each row with its faults and keeps count; see :func:`validate`.

    Iterate once, to the end, then ask for :meth:`report`.
    """

    def __init__(
        self,
        source: Location,
        *,
        max_megapixels: float = MAX_MEGAPIXELS,
        workers: int | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        self.source = source
        self._max_megapixels, self._workers, self._on_progress = max_megapixels, workers, on_progress
        self._began = time.monotonic()
        self._rows = self._ok = self._read = 0
        self._share = 0.0
        self._faults = FaultList()
        self._counts: Counter[str] = Counter()
        self._first: dict[str, list[BadRow]] = {}
        self._images: SeenImages | None = None

    def __iter__(self) -> Iterator[CheckedRow]:
        with (
            closing(read_rows(self.source.path, rename_duplicates=True, keep_given=True)) as reader,
            ImageChecks(self.source.image_root, self._max_megapixels, self._workers) as checks,
        ):
            for mark in _byte_order_marks(reader.files):
                self._count((mark,))
            self._images = SeenImages(checks)
            ahead: deque[list[Row | BadRow]] = deque()
            while chunk := list(islice(reader, _CHUNK)):
                ahead.append(chunk)
                self._read += len(chunk)
                self._share = reader.bytes_read / max(1, reader.bytes_total)
                self._images.begin(image for row in chunk for image in images_of(row))
                if len(ahead) > _AHEAD:
                    yield from self._checked(ahead.popleft())
            while ahead:
                yield from self._checked(ahead.popleft())
        if self._on_progress is not None:
            self._on_progress("validate", self._rows, self._rows)

    def report(self) -> ValidationReport:
        """What was found, after the last row."""
        images = self._images
        return ValidationReport(
            path=self.source.path,
            image_root=self.source.image_root,
            rows=self._rows,
            ok=self._ok,
            broken=self._faults,
            counts=dict(self._counts.most_common()),
            first={kind: tuple(faults) for kind, faults in self._first.items()},
            images=ImageSummary() if images is None else images.summary(),
            seconds=time.monotonic() - self._began,
        )

    def _checked(self, chunk: list[Row | BadRow]) -> Iterator[CheckedRow]:
        assert self._images is not None
        for row in chunk:
            named = images_of(row)
            verdicts = [self._images.verdict(image) for image in named]
            faults = [*_own_faults(row)]
            bad = _bad_like(row)
            faults += [bad(verdict.kind, verdict.detail) for verdict in verdicts if verdict.kind is not None]
            self._rows += 1
            self._ok += not faults
            self._count(faults)
            if self._on_progress is not None and self._rows % _TELL_EVERY == 0:
                # More is read than is done; how much there is in all is known by what was read.
                self._on_progress("validate", self._rows, round(self._read / max(self._share, 1e-9)))
            yield CheckedRow(row if isinstance(row, Row) else None, tuple(faults), verdicts[0] if verdicts else None)
        self._images.done(image for row in chunk for image in images_of(row))

    def _count(self, faults: Sequence[BadRow]) -> None:
        self._counts.update({fault.kind for fault in faults})
        for fault in faults:
            self._faults.append(fault)
            first = self._first.setdefault(fault.kind, [])
            if len(first) < _FIRST:
                first.append(replace(fault, given=None))


# -- one row ---------------------------------------------------------------------------------------------------------


def faults_of(row: Row) -> list[BadRow]:
    """Everything that is wrong with a well-formed row, its image aside."""
    found = list(row_faults(row))
    bad = _bad_like(row)
    if row.renamed_from is not None:
        found = [bad("duplicate_id", "an earlier row has the same id"), *(bad(f.kind, f.detail) for f in found)]
    for where, text in texts_of(row):
        found += [bad(fault.kind, f"{where}: {fault.detail}") for fault in text_faults(text)]
    return found


def texts_of(row: Row) -> Iterator[tuple[str, str]]:
    """The texts of a row, each with the name of its place."""
    if row.has_id:
        yield "id", row.renamed_from or row.id
    if row.caption is not None:
        yield "caption", row.caption
    for number, turn in enumerate(row.conversations or ()):
        yield f"turn {number}", turn.text
    if row.raw_caption is not None:
        yield "raw_caption", row.raw_caption


def images_of(row: Row | BadRow) -> list[str]:
    """The images that a row names: one, or what can be found in a row that is malformed."""
    if isinstance(row, Row):
        return [] if row.image is None else [row.image]
    given = row.given if isinstance(row.given, dict) else {}
    named = [item for key in ("image", "images") for item in _listed(given.get(key)) if isinstance(item, str) and item]
    return list(dict.fromkeys(named))[:_MOST_IMAGES]


def _own_faults(row: Row | BadRow) -> list[BadRow]:
    if isinstance(row, Row):
        return faults_of(row)
    bad = _bad_like(row)
    found = [row]
    for where, text in texts_in(row.given):
        found += [bad(fault.kind, f"{where}: {fault.detail}") for fault in text_faults(text)]
    return found


def _bad_like(row: Row | BadRow) -> Callable[[str, str], BadRow]:
    """Makes faults of a row, under the id that stands in the file."""
    name = row.renamed_from or row.id if isinstance(row, Row) else row.id
    return lambda kind, detail: BadRow(row.file, row.line, name, kind, detail, row.index)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _byte_order_marks(files: Iterable[Path]) -> Iterator[BadRow]:
    for file in files:
        with open(file, "rb") as opened:
            if opened.read(3) == codecs.BOM_UTF8:
                yield BadRow(file.name, 1, None, "byte_order_mark", "the first three bytes are EF BB BF")
