"""The files that rows lie in: which ones a path means, and in which container each of them keeps its rows."""

from __future__ import annotations

import codecs
import os
import re
from pathlib import Path
from typing import BinaryIO, Literal

from mgm_exp.data.strict_json import fault_in
from mgm_exp.errors import DataError

Container = Literal["lines", "list", "parquet", "tar"]

SUFFIXES = (".jsonl", ".json", ".parquet", ".tar")
FORMS = (
    "a JSON list of LLaVA/MGM or ShareGPT rows, JSON lines of Data-Juicer, LLaVA or ShareGPT rows, in UTF-8; "
    "Parquet; or WebDataset tar shards"
)
_OTHER_FILES = {b"PK\x03\x04": "a zip archive", b"\x1f\x8b": "gzip", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
REPORTS = frozenset({"fixes.jsonl", "explore.json", "split.json"})
"""What this package writes beside rows; no rows themselves."""
_TAR_MAGIC = slice(257, 262)
_NUMBERS = re.compile(r"\d+")


def row_files(path: Path) -> list[Path]:
    """The file of rows that a path is, or the shards of a folder in the order of their names.

    Shards are files of one kind whose names differ in their numbers only (``shard-000000.tar``,
    ``train-00001-of-00012.parquet``).

    Raises:
        DataError: a folder holds no such files, or several that are no shards of one data set.
    """
    if not path.is_dir():
        return [path]
    found = candidates(path)
    if not found:
        raise DataError(f"{path} is a folder without a file of rows.", advice=f"Give the file or the shards: {FORMS}.")
    if not are_shards(found):
        raise DataError(
            f"{path} is a folder with several files of rows: {named(found)}.", advice="Give the path of one of them."
        )
    return found


def are_shards(files: list[Path]) -> bool:
    """Whether the names of files differ in their numbers only."""
    return len({_NUMBERS.sub("#", file.name) for file in files}) == 1


def candidates(folder: Path) -> list[Path]:
    """The files of a folder that may hold rows, by their names, sorted; hidden ones are not looked at."""
    try:
        with os.scandir(folder) as listing:
            names = sorted(
                item.name
                for item in listing
                if item.name.endswith(SUFFIXES)
                and item.name not in REPORTS
                and not item.name.startswith(".")
                and item.is_file()
            )
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}.", advice="Check its permissions.") from error
    return [folder / name for name in names]


def named(files: list[Path]) -> str:
    """The names of a few files, in words."""
    names = [file.name for file in files[:6]]
    return ", ".join(names) + (f" and {len(files) - 6} more" if len(files) > 6 else "")


def open_file(path: Path) -> BinaryIO:
    """A file of rows, opened.

    Raises:
        DataError: it is missing, a folder, or may not be read.
    """
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise DataError(f"{path} is not there.", advice=f"Give the path of a file with rows: {FORMS}.") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder.", advice=f"Give the file with the rows: {FORMS}.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.", advice="Check its permissions.") from error


def container_of(file: BinaryIO, path: Path) -> Container:
    """How a file keeps its rows, found out from its first bytes; the file stands at its beginning afterwards.

    Raises:
        DataError: it is empty, or in none of the formats.
    """
    head = file.read(1 << 16)
    file.seek(0)
    if head.startswith(b"PAR1"):
        return "parquet"
    if head[_TAR_MAGIC] == b"ustar" or (path.suffix == ".tar" and head[:1024] == bytes(1024)):
        return "tar"
    for magic, what in _OTHER_FILES.items():
        if head.startswith(magic):
            raise DataError(f"{path} is {what}.", advice=f"Unpack or convert it; what is read is {FORMS}.")
    if path.suffix in (".tar", ".parquet"):
        raise DataError(
            f"{path} is no {path.suffix[1:]} file: its first bytes are {head[:8]!r}.", advice="Get it again."
        )
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\x00" in head[:4]:
        raise DataError(f"{path} is not UTF-8 (it looks like UTF-16).", advice="Save it as UTF-8.")
    start = head.removeprefix(codecs.BOM_UTF8).lstrip(b" \t\r\n")
    if not start:
        raise DataError(f"{path} holds no rows.", advice=f"Give a file that holds {FORMS}.")
    if start[:1] == b"[":
        return "list"
    first, newline, _ = start.partition(b"\n")
    if path.suffix == ".jsonl":
        return "lines"
    if start[:1] != b"{" or (newline and fault_in(first.decode("utf-8", "replace"))[1] and first.rstrip() == b"{"):
        raise DataError(
            f"{path} begins with {first[:40].decode('utf-8', 'replace')!r}, which begins no known format.",
            advice=f"What is read is {FORMS}. A single JSON object around the rows must be taken off.",
        )
    return "lines"
