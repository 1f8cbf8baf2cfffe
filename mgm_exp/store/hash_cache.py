"""Tree fingerprints that do not read gigabytes of unchanged files again."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mgm_exp.errors import DiskFullError

from .files import PathLike, read_json, write_json_atomic
from .keys import file_sha256, files_below, fingerprint

_log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
# A file that was written this recently may be written again without its times showing it.
_SETTLED_S = 2.0


def cached_tree_fingerprint(folders: Sequence[PathLike], cache: PathLike) -> str:
    """One fingerprint of the contents of several folders, in their order; see ``tree_fingerprint``.

    A file's SHA-256 is remembered under its path, size, inode, modification and change time, and taken from there when
    all of these are as they were.

    Args:
        folders: The folders.
        cache: A JSON file for the remembered hashes, made as needed. Damaged, it is rebuilt; several processes may use
            it at once, and the worst that happens is that a file is read twice.

    Raises:
        NotADirectoryError, ValueError: As ``tree_fingerprint``.
    """
    cache = Path(cache)
    known = _read(cache)
    fresh: dict[str, list[Any]] = {}
    trees = [
        fingerprint({relative: _sha256(os.path.realpath(path), known, fresh) for relative, path in files_below(folder)})
        for folder in folders
    ]
    if fresh:
        _write(cache, fresh)
    return fingerprint(trees)


def cached_file_sha256s(paths: Sequence[Path], cache: PathLike, *, are_resolved: bool = False) -> dict[Path, str]:
    """The SHA-256 of each file, remembered as for :func:`cached_tree_fingerprint`.

    Args:
        are_resolved: No link leads to a file, as after ``os.path.realpath``: finding that out takes ten times as long
            as the rest.

    Raises:
        FileNotFoundError: there is no such file.
    """
    cache = Path(cache)
    known = _read(cache)
    fresh: dict[str, list[Any]] = {}
    found = {path: _sha256(str(path) if are_resolved else os.path.realpath(path), known, fresh) for path in paths}
    if fresh:
        _write(cache, fresh)
    return found


def _sha256(name: str, known: dict[str, list[Any]], fresh: dict[str, list[Any]]) -> str:
    before = _identity(name)
    remembered = known.get(name)
    if remembered is not None and remembered[:-1] == before:
        return str(remembered[-1])
    digest = file_sha256(name)
    written_at = max(before[2], before[3]) / 1e9
    if _identity(name) == before and time.time() - written_at > _SETTLED_S:
        fresh[name] = [*before, digest]
    return digest


def _identity(name: str) -> list[int]:
    facts = os.stat(name)
    return [facts.st_size, facts.st_ino, facts.st_mtime_ns, facts.st_ctime_ns]


def _read(cache: Path) -> dict[str, list[Any]]:
    try:
        content = read_json(cache)
        if content["schema_version"] == SCHEMA_VERSION:
            return {str(name): list(facts) for name, facts in content["files"].items() if len(facts) == 5}
        _log.warning("%s is of another version; it is rebuilt", cache)
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("%s is damaged (%s); it is rebuilt", cache, error)
    return {}


def _write(cache: Path, fresh: dict[str, list[Any]]) -> None:
    files = {name: facts for name, facts in (_read(cache) | fresh).items() if os.path.exists(name)}
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(cache, {"schema_version": SCHEMA_VERSION, "files": files}, indent=None)
    except (OSError, DiskFullError) as error:  # costs time on the next run, never a wrong result
        _log.warning("%s", error)
