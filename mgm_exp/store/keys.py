"""Fingerprints: one name for one content, the same on every machine and in every process.

A stage's key is the fingerprint of everything that determines its output. What cannot be written down in one canonical
way (a path, an enum, NaN, a set) is refused with its place, rather than hashed by accident.
"""

from __future__ import annotations

import enum
import hashlib
import io
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

KEY_LENGTH = 20  # hex digits: 80 bits, enough for 10^9 entries at a collision chance below 10^-6
_MAX_DEPTH = 100
_BLOCK = 1 << 20


def fingerprint(obj: object) -> str:
    """SHA-256 of the canonical JSON of ``obj``: keys sorted, no white space, tuples as lists, floats by ``repr``.

    ``1`` and ``1.0`` differ, as they do in JSON; the order of a mapping's keys does not matter.

    Args:
        obj: Nested mappings with string keys, lists, tuples, strings, integers, finite floats, booleans and None.

    Returns:
        64 hexadecimal digits.

    Raises:
        TypeError: Something else is in there (a path, an enum, bytes, a set, a key that is not a string).
        ValueError: A float is NaN or infinite, or the nesting is deeper than 100 levels.
    """
    canonical = json.dumps(
        _plain(obj, "value", 0), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _plain(obj: object, place: str, depth: int) -> object:
    if depth > _MAX_DEPTH:
        raise ValueError(f"{place[:80]}... is nested deeper than {_MAX_DEPTH} levels and has no fingerprint.")
    if isinstance(obj, enum.Enum):
        raise TypeError(f"{place} is the enum {obj!r}; give its name or its value, which is what the key shall hold.")
    if obj is None or isinstance(obj, bool):
        return obj
    if isinstance(obj, str):
        return str(obj)
    if isinstance(obj, int):
        return int(obj)
    if isinstance(obj, float):
        if not math.isfinite(obj):
            raise ValueError(f"{place} is {obj!r}; only finite numbers have a fingerprint.")
        return float(obj)
    if isinstance(obj, Mapping):
        for key in obj:
            if not isinstance(key, str) or isinstance(key, enum.Enum):
                raise TypeError(f"{place} has the key {key!r}; only plain strings may be keys.")
        return {str(key): _plain(value, f"{place}.{key}", depth + 1) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [_plain(value, f"{place}[{index}]", depth + 1) for index, value in enumerate(obj)]
    if isinstance(obj, os.PathLike):
        raise TypeError(f"{place} is the path {obj!r}; a key must not depend on where things lie: give a content hash.")
    raise TypeError(f"{place} is a {type(obj).__name__}, which has no canonical form; give numbers, strings or lists.")


def stage_key(stage: str, version: int, payload: Mapping[str, object]) -> str:
    """The store key of a stage, 20 hexadecimal digits: its name, its ``STAGE_VERSION`` and all that determines it."""
    return fingerprint({"stage": stage, "version": version, "payload": payload})[:KEY_LENGTH]


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits."""
    with open(path, "rb", buffering=0) as file:
        return open_file_sha256(file)


def open_file_sha256(file: io.RawIOBase) -> str:
    """SHA-256 of what is left to read of an unbuffered binary file."""
    digest = hashlib.sha256()
    buffer = bytearray(_BLOCK)
    view = memoryview(buffer)
    while count := file.readinto(buffer):
        digest.update(view[:count])
    return digest.hexdigest()


def tree_fingerprint(folder: str | os.PathLike[str]) -> str:
    """Fingerprint of every file's relative path and bytes below ``folder``, without times, modes and empty folders.

    Symbolic links are followed (model caches are made of them): what counts is what a reader gets.

    Raises:
        NotADirectoryError: ``folder`` is not a folder.
        ValueError: A link leads in a circle, or something is neither a file nor a folder.
    """
    return fingerprint({relative: file_sha256(path) for relative, path in files_below(folder)})


def files_below(folder: str | os.PathLike[str]) -> Iterator[tuple[str, Path]]:
    """(relative POSIX path, path) of every file below ``folder``, links followed. Raises as ``tree_fingerprint``."""
    root = Path(folder)
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is not a folder, so it has no tree fingerprint.")
    yield from _files_below(root, "", ())


def _files_below(folder: Path, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, Path]]:
    here = folder.stat()
    identity = (here.st_dev, here.st_ino)
    if identity in above:
        raise ValueError(f"{folder} is a link that leads in a circle.")
    for name in sorted(os.listdir(folder)):
        path, mode = folder / name, (folder / name).stat().st_mode
        if stat.S_ISDIR(mode):
            yield from _files_below(path, f"{prefix}{name}/", (*above, identity))
        elif stat.S_ISREG(mode):
            yield prefix + name, path
        else:
            raise ValueError(f"{path} is neither a file nor a folder.")
