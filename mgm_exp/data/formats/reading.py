"""Reads rows one after the other, from whatever file or shards they lie in, in memory that does not grow with them.

A row that is none is a :class:`~mgm_exp.data.records.BadRow` with its place and the reason, and the next row is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Protocol

from mgm_exp.data.formats.aside import with_aside
from mgm_exp.data.formats.files import Container, container_of, open_file, row_files
from mgm_exp.data.formats.id_set import IdSet, hash_text
from mgm_exp.data.formats.rows import Malformed, Row, id_of, parse_row
from mgm_exp.data.records import BadRow
from mgm_exp.data.strict_json import Element, LineElements, ListElements
from mgm_exp.errors import DataError


class Elements(Iterator[Element], Protocol):
    """The rows of one file, not yet looked into.

    Attributes:
        bytes_read: How far the file has been read.
    """

    @property
    def bytes_read(self) -> int: ...


class RowReader(Iterator["Row | BadRow"]):
    """Iterates over the rows of a file or of all shards of a folder, in order.

    Args:
        path: The file, or the folder of shards.
        rename_duplicates: Give the second row with an id the id ``<id>#2`` (and so on) instead of calling it bad.
        keep_given: Let each row bring what stands in its file, as :attr:`Row.given`.

    Attributes:
        files: The file, or the shards.
        container: How the first file keeps its rows.
        bytes_read, bytes_total: How far the files have been read, for progress bars.

    Raises:
        DataError: the path cannot be read at all (missing, empty, another format).
    """

    def __init__(self, path: Path | str, *, rename_duplicates: bool = False, keep_given: bool = False) -> None:
        self.path = Path(path)
        self.files = row_files(self.path)
        self._renames, self._keeps_given = rename_duplicates, keep_given
        self._sizes = [_size(file) for file in self.files]
        self.bytes_total = sum(self._sizes)
        self._ids = IdSet()
        self._last_number: dict[int, int] = {}  # of renamed ids: the number of the last one, by the hash of the id
        self._number = 0  # of the file
        self._first_index = 0  # of the file's rows
        self._n_in_file = 0
        self._ignored: dict[str, None] = {}
        self._file: BinaryIO
        self._elements: Elements | None = None
        self.container: Container = self._open()

    @property
    def ignored(self) -> tuple[str, ...]:
        """Columns of bytes, or kinds of files in a shard, that were met so far and are no part of a row."""
        return tuple(self._ignored)

    @property
    def bytes_read(self) -> int:
        here = self._elements.bytes_read if self._elements is not None else 0
        return sum(self._sizes[: self._number]) + here

    def __next__(self) -> Row | BadRow:
        while self._number < len(self.files):
            if self._elements is None:
                try:
                    self._open()
                except DataError as error:
                    return self._lost_file(error)
            assert self._elements is not None
            element = next(self._elements, None)
            if element is not None:
                self._n_in_file = element.index + 1
                return self._row(element)
            self._end_file()
        raise StopIteration

    def close(self) -> None:
        """Closes the file; reading to the end does it too."""
        self._end_file()
        self._number = len(self.files)

    def _open(self) -> Container:
        """Begins with the next file that is not empty."""
        # A writer that shards by something else than the number of rows leaves empty shards.
        while self._sizes[self._number] == 0 and self._number + 1 < len(self.files):
            self._number += 1
        path = self.files[self._number]
        self._file = open_file(path)
        try:
            container = container_of(self._file, path)
            self._elements = _elements(container, self._file, path)
        except BaseException:
            self._file.close()
            raise
        return container

    def _end_file(self) -> None:
        if self._elements is not None:
            self._ignored.update(dict.fromkeys(getattr(self._elements, "ignored", ())))
            self._file.close()
            self._elements = None
        self._number += 1
        self._first_index += self._n_in_file
        self._n_in_file = 0

    def _lost_file(self, error: DataError) -> BadRow:
        """A shard that cannot be read is one bad row: those after it can be."""
        bad = BadRow(self.files[self._number].name, 1, None, "file_ends_early", error.message, self._first_index)
        self._n_in_file = 1
        self._end_file()
        return bad

    def _row(self, element: Element) -> Row | BadRow:
        name, value = self.files[self._number].name, element.value
        place = element if self._first_index == 0 else replace(element, index=element.index + self._first_index)

        def bad(kind: str, detail: str) -> BadRow:
            given = value if self._keeps_given else None
            if isinstance(given, dict) and element.image is not None:
                given = {**given, "image": element.image, "images": None}
            return BadRow(name, place.line, id_of(value), kind, detail, place.index, given)

        if element.fault is not None:
            return bad(element.fault.kind, element.fault.detail)
        try:
            row = with_aside(parse_row(value, name, place))
        except Malformed as error:
            return bad(error.kind, error.detail)
        if element.image is not None:
            row = replace(row, image=element.image, stored_image=row.image)
        if self._keeps_given:
            row = replace(row, given=value)
        if self._ids.add(row.id):
            return row
        if not self._renames:
            return bad("duplicate_id", f"{row.id!r} was the id of an earlier row")
        return replace(row, id=self._free_id(row.id), renamed_from=row.id)

    def _free_id(self, row_id: str) -> str:
        key = hash_text(row_id)
        number = self._last_number.get(key, 1) + 1
        while not self._ids.add(f"{row_id}#{number}"):
            number += 1
        self._last_number[key] = number
        return f"{row_id}#{number}"


def read_rows(path: Path | str, *, rename_duplicates: bool = False, keep_given: bool = False) -> RowReader:
    """The rows of a file, or of the shards of a folder, in one of the known formats, one after the other.

    Args:
        path: The file, or the folder of shards.
        rename_duplicates: Give the second row with an id the id ``<id>#2`` (and so on; :attr:`Row.renamed_from` holds
            the one it had) instead of a bad row of the kind ``duplicate_id``.
        keep_given: Let each row bring what stands in its file, as :attr:`Row.given`.

    Raises:
        DataError: the path is missing, empty, or in none of the formats.
    """
    return RowReader(path, rename_duplicates=rename_duplicates, keep_given=keep_given)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # opening it says why


def _elements(container: Container, file: BinaryIO, path: Path) -> Elements:
    if container == "parquet":
        from mgm_exp.data.formats.parquet import ParquetElements

        return ParquetElements(file, path)
    if container == "tar":
        from mgm_exp.data.formats.webdataset import TarElements

        return TarElements(file, path)
    return ListElements(file) if container == "list" else LineElements(file)
