"""Readers of benchmark files: JSON, JSON lines, TSV and parquet, within limits; nothing in them is ever executed."""

from __future__ import annotations

import ast
import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mgm_exp.errors import DataError
from mgm_exp.store import parse_record

MAX_JSON_BYTES = 4 << 30
MAX_LINE_BYTES = 16 << 20
MAX_CELL = 256 << 20
"""Characters of one TSV cell, which may be an image in base64."""
MAX_ROWS = 20_000_000
_BATCH = 32
"""Rows of a parquet file in memory at a time: they may hold images."""

Row = dict[str, Any]


def _open_fault(path: Path, error: Exception, form: str) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"The file {path} does not exist.", advice="Give the path of an existing file.")
    return DataError(
        f"{path} cannot be read as {form}: {error}.", advice="Is it the file that docs/evaluation.md names?"
    )


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: it is missing, too large or no JSON.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise ValueError(f"{size:,} bytes are more than the {MAX_JSON_BYTES:,} that are read")
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise _open_fault(path, error, "JSON") from error


def read_json_object(path: Path, keys: Sequence[str] = ()) -> Row:
    """A JSON file that holds one object.

    Raises:
        DataError: as :func:`read_json`, or it is no object, or lacks one of ``keys``.
    """
    content = read_json(path)
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if not isinstance(content, dict) or missing:
        wanted = f" with {', '.join(keys)}" if keys else ""
        found = f"keys {list(content)[:6]}" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise DataError(
            f"{path} must hold a JSON object{wanted}, and holds {found}.",
            advice="Is it the file that docs/evaluation.md names?",
        )
    return content


def read_json_lines(path: Path) -> Iterator[tuple[int, Row]]:
    """(line number, object) of every line of a JSONL file that is not blank.

    Raises:
        DataError: the file is missing, or a line is too long, no JSON, or no object.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise ValueError(f"line {number} is longer than {MAX_LINE_BYTES:,} bytes")
                if not line.strip():
                    continue
                try:
                    row = parse_record(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except ValueError as error:
                    raise ValueError(f"line {number} is no JSON ({error})") from error
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} holds a {type(row).__name__}, not an object")
                yield number, row
    except (OSError, ValueError) as error:
        raise _open_fault(path, error, "JSON lines") from error


def read_tsv(path: Path) -> tuple[list[str], Iterator[tuple[int, dict[str, str]]]]:
    """Column names of a tab-separated file, and its rows as (line number, cells).

    Quoting as pandas reads it: cells may stand in double quotes, a double quote inside is doubled.

    Raises:
        DataError: the file is missing or no table; while the rows are read: a row has more or fewer cells.
    """
    path = Path(path)
    rows = _tsv_rows(path)
    _, header = next(rows, (0, []))
    names = [name.strip().removeprefix("\ufeff") for name in header]
    if len(names) < 2 or len(set(names)) < len(names):
        raise DataError(
            f"{path} is no tab-separated table: its first line must name the columns, each once.",
            advice="Is it the file that docs/evaluation.md names?",
        )

    def cells() -> Iterator[tuple[int, dict[str, str]]]:
        for number, row in rows:
            if len(row) != len(names):
                raise DataError(f"{path}, line {number}: {len(row)} cells where the header names {len(names)}.")
            yield number, dict(zip(names, row, strict=True))

    return names, cells()


def _tsv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(max(csv.field_size_limit(), MAX_CELL))
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file, delimiter="\t")
            for row in reader:
                if row:
                    yield reader.line_num, row
                if reader.line_num > MAX_ROWS:
                    raise ValueError(f"more than {MAX_ROWS:,} lines")
    except (OSError, ValueError, csv.Error) as error:
        raise _open_fault(path, error, "a tab-separated table") from error


def parquet_files(path: Path, named: str = "") -> list[Path]:
    """A parquet file itself, or all of a folder and its subfolders, in order of their paths.

    Args:
        path: A file or a folder.
        named: In a folder, only files whose name begins so.

    Raises:
        DataError: there is none.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    found = sorted(file for file in path.rglob("*.parquet") if file.name.startswith(named))
    if not found:
        which = f"{named}*.parquet" if named else "parquet file"
        raise DataError(f"{path} holds no {which}.", advice="Give the folder that the dataset was downloaded into.")
    return found


def read_parquet(path: Path, needed: Sequence[str]) -> Iterator[Row]:
    """Rows of a parquet file, a few at a time.

    Raises:
        DataError: it is no parquet file, or lacks a column.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            missing = [name for name in needed if name not in file.schema_arrow.names]
            if missing:
                raise DataError(
                    f"{path} lacks the columns {missing}; it has {file.schema_arrow.names[:12]}.",
                    advice="Is it the file that docs/evaluation.md names?",
                )
            for batch in file.iter_batches(_BATCH):
                yield from batch.to_pylist()
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise _open_fault(path, error, "parquet") from error


def image_bytes(cell: Any) -> bytes | None:
    """The bytes of an image column's cell (``{"bytes": ..., "path": ...}``), or None where there are none."""
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    return bytes(content) if isinstance(content, (bytes, bytearray)) and content else None


def literal_list(cell: Any) -> list[str]:
    """A list of texts that a table holds as a list or as its Python literal (``"['a', 'b']"``); read, never run.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(cell, str):
        if len(cell) > 100_000:
            raise ValueError("a list literal of more than 100,000 characters")
        try:
            cell = ast.literal_eval(cell)
        except (SyntaxError, ValueError, MemoryError, RecursionError, TypeError) as error:
            raise ValueError(f"{cell[:60]!r} is no list of texts") from error
    if not isinstance(cell, list):
        raise ValueError(f"a list is needed, not {type(cell).__name__}")
    return [str(item) for item in cell]
