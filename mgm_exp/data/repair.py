"""A clean copy of a dataset: what can be repaired without guessing is repaired, what cannot is left out, all is told.

    report, fixes = repair(find_source("pairs.jsonl"), Path("clean"))

The copy holds the rows in the format that they came in, the images that they use (copied, never linked), and
``fixes.jsonl``: for each row that was repaired or left out, why, and what was changed. The original is only read.

Repaired are: control characters (removed), misread UTF-8 where decoding it again is exact, Data-Juicer's end token in a
text (removed), an id that an earlier row has (``#2`` is added), a byte-order mark. An absolute image path becomes
relative, as it would lead back to the original; a row without an id gets the one it was known by where rows before it
are missing. Everything else is left out.

The copy is built beside its place and appears there when it is complete. Interrupted and given again, the work begins
anew but for the images that were copied, with the same result.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mgm_exp.data.formats import Location, Row
from mgm_exp.data.formats.aside import with_aside
from mgm_exp.data.formats.rows import Malformed, parse_row
from mgm_exp.data.image_copies import ImageCopies
from mgm_exp.data.records import json_line
from mgm_exp.data.rewriting import Rewriter
from mgm_exp.data.row_texts import with_texts
from mgm_exp.data.strict_json import Element
from mgm_exp.data.text_faults import repaired
from mgm_exp.data.validation import MAX_MEGAPIXELS, CheckedRow, Progress, Validation, faults_of
from mgm_exp.data.validation_report import ValidationReport
from mgm_exp.errors import UserError
from mgm_exp.store import Lease, disk_full_named, fsync_folder

LOG = "fixes.jsonl"

REPAIRABLE = frozenset({"control_characters", "mojibake", "foreign_token", "duplicate_id"})
"""Kinds of a row whose every fault is one of these are repaired, if it then has none."""

_MARK = ".source"


@dataclass(frozen=True)
class RepairReport:
    """What became of a copy.

    Args:
        folder: Where it is; nothing is there if no row could be kept.
        written: Rows in it.
        repaired: Those of them that were changed.
        left_out: Rows of the original that are not in it.
        images: Images in it.
        log: Name of the file in it that tells about each repaired and each missing row.
    """

    folder: Path
    written: int
    repaired: int
    left_out: int
    images: int
    log: str = LOG


def check_target(folder: Path) -> None:
    """Whether a copy can be made there.

    Raises:
        UserError: the folder holds something, or is a file.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"--fix {folder} is a file or a link.", advice="Give a folder that is new or empty.")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"--fix {folder} is not empty.", advice="Give a folder that is new or empty.")


def repair(
    source: Location,
    folder: Path,
    *,
    max_megapixels: float = MAX_MEGAPIXELS,
    workers: int | None = None,
    on_progress: Progress | None = None,
) -> tuple[ValidationReport, RepairReport]:
    """Validates a dataset and writes a clean copy of it, in one pass.

    Args:
        source: Rows and images.
        folder: Where the copy goes: new, or empty.
        max_megapixels, workers, on_progress: As for :func:`mgm_exp.data.validate`.

    Returns:
        What is wrong with the original, and what became of it.

    Raises:
        UserError: ``folder`` cannot be used, see :func:`check_target`.
        DataError: the rows cannot be read at all, or an image changed while it was copied.
        DiskFullError: no space is left; ``folder`` is then as it was before.
    """
    check_target(folder)
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    lease = Lease(folder.absolute().parent / f".{folder.name}.lease")
    building = folder.with_name(f".{folder.name}.partial")
    with lease, disk_full_named(folder):
        try:
            check_target(folder)  # another command may have finished it while we waited
            _begin(building, source, max_megapixels)
            validation = Validation(source, max_megapixels=max_megapixels, workers=workers, on_progress=on_progress)
            with _Copy(building, source, max_megapixels) as copy:
                for checked in validation:
                    copy.take(checked)
                report = validation.report()
                fixes = copy.finish(folder, report)
            lease.check()
            if fixes.written:
                _publish(building, folder)
            else:
                shutil.rmtree(building)
        finally:
            lease.release(forget=True)
    return report, fixes


def _begin(building: Path, source: Location, max_megapixels: float) -> None:
    """An empty folder, or that of an interrupted attempt on the same data."""
    mark = f"{os.path.realpath(source.path)}\n{os.path.realpath(source.image_root)}\n{max_megapixels}\n"
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError):
        if (building / _MARK).read_text(encoding="utf-8", errors="surrogateescape") == mark:
            return
    if building.exists():
        shutil.rmtree(building)
    building.mkdir()
    (building / _MARK).write_text(mark, encoding="utf-8", errors="surrogateescape")


def _publish(building: Path, folder: Path) -> None:
    (building / _MARK).unlink()
    for place, _, _ in os.walk(building):
        fsync_folder(place)
    os.rename(building, folder)  # an empty folder gives way
    fsync_folder(folder.absolute().parent)


class _Copy:
    """The copy while it is being made."""

    def __init__(self, building: Path, source: Location, max_megapixels: float) -> None:
        self._building, self._source = building, source
        self._rows = Rewriter(source, building)
        self._log = open(building / LOG, "w", encoding="utf-8", errors="backslashreplace", newline="\n")  # noqa: SIM115
        self._images = ImageCopies(building, source.image_root, max_megapixels)
        self._written = self._repaired = self._left_out = self._packed = 0

    def __enter__(self) -> _Copy:
        return self

    def __exit__(self, *error: object) -> None:
        self._images.close()
        self._rows.close()
        self._log.close()

    def take(self, checked: CheckedRow) -> None:
        """Copies a row, repairs it, or leaves it out."""
        row, why = checked.row, ""
        changes: list[dict[str, Any]] = []
        if row is None or any(fault.kind not in REPAIRABLE for fault in checked.faults):
            fixed = None
        else:
            fixed, changes, why = self._fixed(row, checked)
        if fixed is not None and fixed.image is not None and not self._rows.is_packed:
            fixed, moved = self._with_image(fixed)
            changes += moved
            if fixed is None:
                why = "its image has the name of a file of the copy"
        if row is None or fixed is None:
            self._left_out += 1
            self._tell(checked, "left_out", [], why)
            return
        if fixed.image is not None and not self._rows.is_packed:
            self._images.add(fixed.image, row.image or "", checked.verdict.sha256 if checked.verdict else "")
        self._rows.write(fixed)
        self._packed += self._rows.is_packed and fixed.image is not None
        self._written += 1
        if changes:
            self._repaired += 1
            self._tell(checked, "repaired", changes, "")

    def _fixed(self, row: Row, checked: CheckedRow) -> tuple[Row | None, list[dict[str, Any]], str]:
        """The row without its faults and what was changed; or None and why it cannot be repaired."""
        assert row.given is not None
        given: Mapping[str, Any] = row.given
        changes: list[dict[str, Any]] = []
        can_rename = self._rows.can_rename(row)
        if row.renamed_from is not None and not can_rename:
            return None, [], "its file keeps ids as numbers, and there is no free one to be sure of"
        if row.renamed_from is not None or (not row.has_id and self._left_out and can_rename):
            changes.append({"where": "id", "before": row.renamed_from, "after": row.id})
            given = {**given, "id": row.id}
        if any(fault.kind != "duplicate_id" for fault in checked.faults):
            if any(fault.detail.startswith("id: ") for fault in checked.faults):
                return None, [], "its id is damaged, and a repaired one might be that of another row"
            given, texts = with_texts(given, repaired)
            if any(after is None for _, _, after in texts):
                return None, [], "what was lost cannot be known"
            changes += [{"where": where, "before": before, "after": after} for where, before, after in texts]
        if not changes:
            return row, [], ""
        try:
            read = with_aside(parse_row(dict(given), row.file, Element(row.line, row.index)))
        except Malformed as error:
            return None, [], f"without its damage it would be unusable: {error.kind}"
        fixed = replace(read, id=row.id, image=row.image, stored_image=row.stored_image, given=given)
        remaining = faults_of(fixed)
        if remaining:
            return None, [], f"without its damage it would be unusable: {remaining[0].kind}"
        return fixed, changes, ""

    def _with_image(self, row: Row) -> tuple[Row | None, list[dict[str, Any]]]:
        """The row with the path that its image has in the copy."""
        assert row.image is not None and row.given is not None
        path = row.image
        if os.path.isabs(path):
            path = os.path.relpath(os.path.realpath(path), os.path.realpath(self._source.image_root))
        taken = {LOG, _MARK, *self._rows.names}
        if posixpath.normpath(path) in taken:
            return None, []
        if path == row.image:
            return row, []
        given = _with_image_path(row.given, path)
        return replace(row, image=path, given=given), [{"where": "image", "before": row.image, "after": path}]

    def _tell(self, checked: CheckedRow, action: str, changes: list[dict[str, Any]], why: str) -> None:
        row = checked.row or checked.faults[0]
        name = row.renamed_from or row.id if isinstance(row, Row) else row.id
        entry: dict[str, Any] = {
            "file": row.file,
            "line": row.line,
            "index": row.index,
            "id": name,
            "action": action,
            "faults": [{"kind": fault.kind, "detail": fault.detail} for fault in checked.faults],
        }
        self._log.write(
            json_line({**entry, **({"changes": changes} if changes else {}), **({"why": why} if why else {})})
        )

    def finish(self, folder: Path, report: ValidationReport) -> RepairReport:
        """Waits for the images, closes the files, and takes away what an earlier attempt left."""
        for mark in report.first.get("byte_order_mark", ()):
            self._log.write(
                json_line({"file": mark.file, "line": 1, "id": None, "action": "repaired", "faults": [_plain(mark)]})
            )
        self._images.finish()
        self._rows.close()
        self._log.flush()
        os.fsync(self._log.fileno())
        kept = {LOG, _MARK, *self._rows.names}
        for relative in _files(self._building):
            if relative not in kept and relative not in self._images:
                (self._building / relative).unlink()
        images = self._packed or len(self._images)
        return RepairReport(folder, self._written, self._repaired, self._left_out, images)


def _plain(fault: Any) -> dict[str, str]:
    return {"kind": fault.kind, "detail": fault.detail}


def _files(folder: Path) -> Iterator[str]:
    for place, _, names in os.walk(folder):
        for name in names:
            yield posixpath.normpath(os.path.relpath(os.path.join(place, name), folder))


def _with_image_path(given: Mapping[str, Any], path: str) -> dict[str, Any]:
    """A row as it stands in its file, with another image path."""
    key = "images" if given.get("images") else "image"
    return {**given, key: [path] if isinstance(given[key], list) else path}
