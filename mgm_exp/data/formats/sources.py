"""Where rows and their images lie: what a path on a command line means, and a fingerprint of all that it holds."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from mgm_exp.data.formats.files import FORMS, are_shards, candidates, container_of, named, open_file, row_files
from mgm_exp.data.formats.id_set import IdSet
from mgm_exp.data.formats.reading import RowReader, read_rows
from mgm_exp.data.formats.rows import Row
from mgm_exp.data.records import BadRow
from mgm_exp.data.tar_members import split_member
from mgm_exp.errors import DataError

_LOOKED_AT = 20


@dataclass(frozen=True)
class Location:
    """Where rows and their images lie.

    Args:
        path: The file of rows, or the folder of shards.
        image_root: Folder that the image paths are relative to.
    """

    path: Path
    image_root: Path


def find_source(path: Path | str, image_root: Path | str | None = None) -> Location:
    """What a path means: a file of rows, a folder of shards, or a folder that holds one file of rows.

    In a folder with several JSON or Parquet files those without rows (reports, lists of rejected rows) are passed over.

    Args:
        path: As it was given.
        image_root: Folder of the images; where it is not given, the folder that the rows lie in.

    Raises:
        DataError: there is nothing of that kind, or it cannot be told which file is meant.
    """
    path = Path(path)
    if not path.is_dir():
        open_file(path).close()
        rows = path
    else:
        rows = _rows_in(path)
    root = Path(image_root) if image_root is not None else (rows if rows.is_dir() else rows.parent)
    if not root.is_dir():
        raise DataError(f"The image root {root} is not a folder.", advice="Give the folder that image paths begin in.")
    return Location(rows, root)


def _rows_in(folder: Path) -> Path:
    found = candidates(folder)
    if len(found) > 1 and are_shards(found):
        return folder
    with_rows = found if len(found) == 1 else [file for file in found if _holds_rows(file)]
    if len(with_rows) == 1:
        return with_rows[0]
    if with_rows:
        raise DataError(
            f"{folder} is a folder with several files of rows: {named(with_rows)}.",
            advice="Give the path of one of them.",
        )
    what = f"the files {named(found)} hold none" if found else "it holds no .jsonl, .json, .parquet or .tar file"
    raise DataError(f"{folder} is a folder without rows: {what}.", advice=f"Give a file or shards: {FORMS}.")


def _holds_rows(path: Path) -> bool:
    """Whether one of the first rows of a file is one."""
    try:
        reader = read_rows(path)
    except DataError:
        return False
    try:
        return any(isinstance(row, Row) for row in islice(reader, _LOOKED_AT))
    finally:
        reader.close()


def source_fingerprint(path: Path | str, image_root: Path | str) -> str:
    """SHA-256 over the bytes of the rows and, for each image they name, its path, size and time of change.

    It changes whenever the data may have changed, without reading the images; damaged rows are no obstacle. Of a tar
    shard, which holds the images too, name, size and time of change stand for its bytes.

    Raises:
        DataError: the rows cannot be read at all.
    """
    path, root = Path(path), os.fspath(image_root)
    digest = hashlib.sha256()
    files = row_files(path)
    for file in files:
        _add_file(digest, file)
    if _is_tar(files[0]):
        return digest.hexdigest()
    seen = IdSet()
    for row in _rows(read_rows(path)):
        if row.image is None or not seen.add(row.image):
            continue
        packed = split_member(row.image)
        try:
            facts = os.stat(os.path.join(root, packed[0] if packed else row.image))
            state = f"{facts.st_size} {facts.st_mtime_ns}"
        except (OSError, ValueError) as error:
            state = type(error).__name__
        digest.update(f"\n{row.image}\0{state}".encode())
    return digest.hexdigest()


def _add_file(digest: hashlib._Hash, file: Path) -> None:
    if _is_tar(file):
        facts = file.stat()
        digest.update(f"\n{file.name}\0{facts.st_size} {facts.st_mtime_ns}".encode())
        return
    with open_file(file) as opened:
        while block := opened.read(1 << 20):
            digest.update(block)


def _is_tar(file: Path) -> bool:
    with open_file(file) as opened:
        try:
            return container_of(opened, file) == "tar"
        except DataError:
            return file.suffix == ".tar"


def _rows(reader: RowReader) -> Iterator[Row]:
    return (row for row in reader if not isinstance(row, BadRow))
