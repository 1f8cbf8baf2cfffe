"""Divides a dataset into training, validation and test rows, so that no image is in two of them.

    report = split_rows(find_source("pairs.jsonl"), Path("parts"), shares=(0.8, 0.1, 0.1))

Rows are one group if their images have the same bytes, wherever the files lie; rows of text alone if they have the same
id. The division is stratified, exact up to the size of a group, and a function of the rows and the seed: neither their
order nor the number of threads matters. Rows are read twice and never held; a row costs 24 bytes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mgm_exp.data.apportionment import apportion
from mgm_exp.data.formats import Location, Row, RowReader, read_rows
from mgm_exp.data.formats.conversion import RejectedFile
from mgm_exp.data.formats.copying import copy_rows
from mgm_exp.data.formats.id_set import hash_text
from mgm_exp.data.images import ImageFault, read_image_file
from mgm_exp.data.records import BadRow
from mgm_exp.errors import DataError, UserError
from mgm_exp.store import disk_full_named, fsync_folder, write_json_atomic

PARTS = ("train", "validation", "test")
SHARES = (0.8, 0.1, 0.1)
SCHEMA_VERSION = 1
REPORT = "split.json"
_CHUNK = 512
_NOWHERE = -1
_MOST_KEYS = 1000  # that are remembered for saying which there are

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PartReport:
    """One part of a split.

    Args:
        file: Its file or folder of shards, relative to the split's folder.
        rows, groups: How many rows and how many groups (different images) it has.
        strata: Number of rows in each stratum.
        fingerprint: SHA-256 over the ids of its rows, whatever their order.
    """

    file: str
    rows: int
    groups: int
    strata: dict[str, int]
    fingerprint: str


@dataclass(frozen=True)
class SplitReport:
    """A split; ``split.json``.

    Args:
        source: Name of the file or folder that was split.
        rows: Rows read: those of all parts and the rejected ones.
        by: The key that strata were made by; None: the length of the answer.
        unread_images: Images that could not be read; their rows were grouped by the path instead.
    """

    source: str
    rows: int
    shares: dict[str, float]
    seed: int
    by: str | None
    groups: int
    unread_images: int
    parts: dict[str, PartReport]
    rejected: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        parts = {name: dict(vars(part)) for name, part in self.parts.items()}
        return {"schema_version": SCHEMA_VERSION, **vars(self), "parts": parts}


def split_rows(
    source: Location,
    out: Path,
    *,
    shares: Sequence[float] = SHARES,
    seed: int = 0,
    by: str | None = None,
    reads_images: bool = True,
    threads: int | None = None,
    on_progress: Progress | None = None,
) -> SplitReport:
    """Writes the parts of a dataset, in its own format, ``split.json`` and (if there are any) ``rejected.jsonl``.

    Args:
        source: Where the rows and images lie.
        out: Folder that is made, whole or not at all; it must not exist, or be empty.
        shares: Of training, validation and test rows; they are brought to a sum of 1. A part of share 0 is not written.
        seed: Another one gives another division.
        by: Key of the rows whose values are the strata, with dots for keys inside keys; None: whether there is an
            image, and how long the answer is.
        reads_images: Whether rows belong together by the bytes of their images; else by their paths.
        threads: That read images (default: one a core).
        on_progress: Told ``(what, done, total)``.

    Raises:
        UserError: ``out`` is not free, the shares are none, or no row has the key ``by``.
        DataError: the rows cannot be read, or none is left; or no image can be read.
    """
    portions = _portions(shares)
    _check_free(out)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an attempt that was killed
    with disk_full_named(out):
        try:
            partial.mkdir()
            rejected = RejectedFile(partial / "rejected.jsonl")
            rows = _Rows(source, by, reads_images, threads, on_progress)
            rows.read(rejected)
            parts = rows.apportioned(portions, seed)
            files = copy_rows(source.path, partial, PARTS, parts, on_progress)
            report = rows.report(parts, portions, seed, files, dict(sorted(rejected.counts.items())))
            write_json_atomic(partial / REPORT, report.to_json())
            if out.exists():
                out.rmdir()
            os.rename(partial, out)
            fsync_folder(out.absolute().parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return report


class _Rows:
    """What has to be known of every row to divide them."""

    def __init__(
        self,
        source: Location,
        by: str | None,
        reads_images: bool,
        threads: int | None,
        on_progress: Progress | None,
    ) -> None:
        self.source, self.by, self.reads_images, self.on_progress = source, by, reads_images, on_progress
        self.threads = threads or os.cpu_count() or 1
        self.index, self.group, self.stratum, self.id = array("Q"), array("Q"), array("L"), array("Q")
        self.codes: dict[str, int] = {}  # of the strata, in the order in which they are met
        self.n_read = 0
        self.n_with_key = 0
        self.keys: Counter[str] = Counter()
        self.n_images = 0  # rows with an image
        self.n_unread = 0
        self.unread: set[int] = set()  # groups of those whose image cannot be read

    def read(self, rejected: RejectedFile) -> None:
        reader = read_rows(self.source.path)
        try:
            with ThreadPoolExecutor(self.threads) as pool:
                for chunk in _chunks(reader):
                    rows = [row for row in chunk if isinstance(row, Row)]
                    for bad in (row for row in chunk if isinstance(row, BadRow)):
                        rejected.add(bad)
                    for row, group in zip(rows, pool.map(self._group, rows), strict=True):
                        self._add(row, group)
                    self.n_read += len(chunk)
                    self._tell(reader)
        finally:
            reader.close()
        if not self.id:
            raise DataError(f"{self.source.path} has no row that could be split: {rejected.in_words()}.")
        if self.n_unread and self.n_unread == self.n_images:
            raise DataError(
                f"None of the images is below {self.source.image_root}, so it cannot be told which rows share one.",
                advice="Give their folder with --images, or let equal paths stand for equal images with --by-path.",
            )
        if self.by is not None and not self.n_with_key:
            known = ", ".join(name for name, _ in self.keys.most_common(12)) or "none"
            raise UserError(f"--by {self.by}: no row has that key.", advice=f"Keys that rows have: {known}.")

    def _add(self, row: Row, group: int) -> None:
        self.n_images += row.image is not None
        self.n_unread += group in self.unread
        self.index.append(row.index)
        self.group.append(group)
        self.stratum.append(self.codes.setdefault(self._stratum(row), len(self.codes)))
        self.id.append(hash_text(row.id if row.has_id else f"\0{_said(row)}"))

    def _group(self, row: Row) -> int:
        """A number that rows with the same image share; of a row of text alone, rows with the same id."""
        if row.image is None:
            return hash_text(f"id:{row.id}" if row.has_id else f"text:{_said(row)}")
        if not self.reads_images:
            return hash_text(f"path:{row.image}")
        try:
            content = read_image_file(self.source.image_root, row.image)
        except ImageFault:
            group = hash_text(f"path:{row.image}")
            self.unread.add(group)
            return group
        return int.from_bytes(hashlib.sha256(content).digest()[:8], "little")

    def _stratum(self, row: Row) -> str:
        if self.by is None:
            return f"{'text only' if row.image is None else 'image'}, {_bucket(len(_answer(row).split()))} words"
        if len(self.keys) < _MOST_KEYS:
            self.keys.update(list(row.extra))
        value: Any = row.extra
        for key in self.by.split("."):
            value = value.get(key) if hasattr(value, "get") else None
        if value is None:
            return "(none)"
        self.n_with_key += 1
        return str(value)[:200]

    def apportioned(self, shares: Sequence[float], seed: int) -> npt.NDArray[np.int8]:
        """The part of each row of the file, by its index; -1 for rejected ones."""
        self.labels = sorted(self.codes)
        rank = np.empty(len(self.labels), np.int64)
        for place, label in enumerate(self.labels):
            rank[self.codes[label]] = place
        self.strata = rank[np.frombuffer(self.stratum, dtype=f"u{self.stratum.itemsize}")]
        groups = np.frombuffer(self.group, np.uint64)
        parts = np.full(self.n_read, _NOWHERE, np.int8)
        parts[np.frombuffer(self.index, np.uint64).astype(np.int64)] = apportion(groups, self.strata, shares, seed)
        return parts

    def report(
        self,
        parts: npt.NDArray[np.int8],
        shares: Sequence[float],
        seed: int,
        files: dict[str, str],
        rejected: dict[str, int],
    ) -> SplitReport:
        mine = parts[np.frombuffer(self.index, np.uint64).astype(np.int64)]
        groups, ids = np.frombuffer(self.group, np.uint64), np.frombuffer(self.id, np.uint64)
        found = {}
        for number, name in enumerate(PARTS):
            if name not in files:
                continue
            here = mine == number
            counts = np.bincount(self.strata[here], minlength=len(self.labels))
            strata = {label: int(count) for label, count in zip(self.labels, counts, strict=True)}
            fingerprint = hashlib.sha256(np.sort(ids[here]).tobytes()).hexdigest()
            n_groups = len(np.unique(groups[here]))
            found[name] = PartReport(files[name], int(here.sum()), n_groups, strata, fingerprint)
        return SplitReport(
            source=self.source.path.name,
            rows=self.n_read,
            shares=dict(zip(PARTS, shares, strict=True)),
            seed=seed,
            by=self.by,
            groups=len(np.unique(groups)),
            unread_images=len(self.unread),
            parts=found,
            rejected=rejected,
        )

    def _tell(self, reader: RowReader) -> None:
        if self.on_progress is not None:
            share = reader.bytes_read / max(1, reader.bytes_total)
            self.on_progress("read rows and images", self.n_read, round(self.n_read / max(share, 1e-9)))


def _chunks(reader: RowReader) -> Iterator[list[Row | BadRow]]:
    while chunk := list(islice(reader, _CHUNK)):
        yield chunk


def _portions(shares: Sequence[float]) -> tuple[float, ...]:
    given = [*shares, 0.0][: len(PARTS)]
    is_fine = len(shares) in (2, 3) and all(0 <= share < float("inf") for share in shares)
    if not is_fine or not given[0] or sum(share > 0 for share in given) < 2:
        raise UserError(
            f"{','.join(f'{share:g}' for share in shares)} are no shares to split by.",
            advice="Give two or three numbers from 0 up, for training, validation and test: 80,10,10. "
            "The first and one other have to be above 0.",
        )
    return tuple(share / sum(given) for share in given)


def _check_free(out: Path) -> None:
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out.parent} is not a folder.", advice="Make it first.")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} is there already and not an empty folder.", advice="Give another name.")


def _answer(row: Row) -> str:
    if row.conversations is None:
        return row.caption or ""
    return " ".join(turn.text for turn in row.conversations if turn.speaker == "gpt")


def _said(row: Row) -> str:
    turns = row.conversations or ()
    return "\0".join([row.image or "", row.caption or "", *(f"{turn.speaker}:{turn.text}" for turn in turns)])


def _bucket(words: int) -> str:
    """Powers of two: 0, 1, 2-3, 4-7, ..., 1024 and more."""
    if words < 2:
        return str(words)
    low = 1 << min(words.bit_length() - 1, 10)
    return f"{low}-{2 * low - 1}" if low < 1024 else "1024+"
