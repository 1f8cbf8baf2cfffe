"""Folders that say of themselves whether they are whole: checkpoints and published store entries.

The last thing written into a folder is its mark, ``MANIFEST.json``, with the size and SHA-256 of every other file. A
folder without its mark was never finished; one whose files differ from it is damaged. Both are recognised, named and
passed over.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import json
import os
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path, PurePosixPath
from typing import Any

from .files import TEMPORARY, PathLike, disk_full_named, fsync_folder, parse_json, regular_files, write_atomic
from .keys import file_sha256, fingerprint, open_file_sha256

MARK = "MANIFEST.json"
SCHEMA_VERSION = 1


def seal(folder: PathLike) -> Path:
    """Writes the completeness mark of ``folder``: every file is hashed and fsynced, then the mark, then the folders.

    Left-over temporary files of an interrupted ``write_atomic`` are removed first. Sealing again after a change renews
    the mark.

    Returns:
        The path of the mark.

    Raises:
        ValueError: There is a symbolic link or a special file in the folder.
        DiskFullError: No space is left for the mark; the folder then has none.
    """
    folder = Path(folder)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(folder / MARK)
    files: dict[str, dict[str, object]] = {}
    for relative in regular_files(folder):
        path = folder / relative
        if TEMPORARY.match(path.name):
            os.unlink(path)
            continue
        with disk_full_named(path), open(path, "rb", buffering=0) as file:
            digest = open_file_sha256(file)
            os.fsync(file.fileno())  # delayed allocation: a full disk may only show here
            facts = os.fstat(file.fileno())
        files[relative] = {"sha256": digest, "size": facts.st_size, "mtime_ns": facts.st_mtime_ns}
    for parent in sorted({str(PurePosixPath(relative).parent) for relative in files} - {"."}):
        fsync_folder(folder / parent)
    write_atomic(folder / MARK, _encode(files))
    return folder / MARK


def _encode(files: dict[str, dict[str, object]]) -> bytes:
    # The digest and the fixed layout make a flipped bit in the mark itself visible.
    content = {"schema_version": SCHEMA_VERSION, "digest": fingerprint(files), "files": files}
    return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=True).encode("ascii") + b"\n"


def verify(folder: PathLike, *, full: bool = True) -> list[str]:
    """What is wrong with a sealed folder, one sentence each, the file first; an empty list if it is whole.

    Args:
        folder: The folder to look at.
        full: Hash every file. If False, a file is hashed only when its modification time is not the one that was
            sealed: cheap, and blind to bits that rot on the disk without a write.
    """
    folder = Path(folder)
    try:
        files, _ = read_mark(folder)
    except FileNotFoundError:
        return [f"{MARK}: missing, so the folder was never completed"]
    except (OSError, ValueError) as error:
        return [f"{MARK}: damaged ({error})"]
    try:
        present = set(regular_files(folder)) - {MARK}
    except (OSError, ValueError) as error:
        return [f"{folder.name}: {error}"]
    faults = [f"{name}: missing" for name in sorted(files.keys() - present)]
    faults += [f"{name}: not in the manifest" for name in sorted(present - files.keys())]
    for name in sorted(files.keys() & present):
        try:
            fault = _file_fault(folder / name, files[name], full)
        except OSError as error:
            fault = f"cannot be read ({error.strerror})"
        if fault:
            faults.append(f"{name}: {fault}")
    return faults


def read_mark(folder: Path) -> tuple[dict[str, dict[str, Any]], str]:
    """``parse_mark`` of a folder's mark; OSError where it cannot be read."""
    return parse_mark((folder / MARK).read_bytes())


def parse_mark(raw: bytes) -> tuple[dict[str, dict[str, Any]], str]:
    """What a mark says of each file (``sha256``, ``size``, ``mtime_ns``), and its digest over all of it.

    Raises:
        ValueError: it is no mark, was changed, or names a path outside of its folder.
    """
    content = parse_json(raw)
    if not isinstance(content, dict) or content.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"schema_version {SCHEMA_VERSION} expected")
    files: dict[str, dict[str, Any]] = content.get("files") or {}
    well_formed = isinstance(files, dict) and all(
        isinstance(fact, dict) and set(fact) == {"sha256", "size", "mtime_ns"} for fact in files.values()
    )
    if not well_formed or raw != _encode(files):
        raise ValueError("its content does not match its own digest")
    for name in files:
        if name != str(PurePosixPath(name)) or name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise ValueError(f"it names the path {name!r} outside the folder")
    return files, str(content["digest"])


def _file_fault(path: Path, sealed: dict[str, Any], full: bool) -> str | None:
    facts = path.stat()
    if facts.st_size != sealed["size"]:
        return f"{facts.st_size:,} bytes instead of {sealed['size']:,}"
    if not full and facts.st_mtime_ns == sealed["mtime_ns"]:
        return None
    if file_sha256(path) != sealed["sha256"]:
        return "its SHA-256 is not the one in the manifest"
    if facts.st_mtime_ns != sealed["mtime_ns"]:
        # The bytes are right (a copy changed the time): put the time back, so that the next look is cheap again.
        with contextlib.suppress(OSError):  # not our file: stays slow, stays right
            os.utime(path, ns=(facts.st_atime_ns, sealed["mtime_ns"]))
    return None


def publish_folder(
    tmp: PathLike, final: PathLike, *, replace: bool = True, before_rename: Callable[[], None] | None = None
) -> Path:
    """Seals ``tmp`` and renames it to ``final``, which is never seen half-done.

    Where ``final`` exists already (a step that is saved again after a roll-back) it is first moved to ``<final>.old``,
    which ``newest_whole`` knows, so that a crash between the two renames loses nothing.

    Args:
        tmp: The finished folder, on the same file system; its name should end in ``.tmp``.
        final: Where it shall be.
        replace: If False, an existing ``final`` raises FileExistsError and ``tmp`` stays, sealed.
        before_rename: Called when all is sealed, immediately before the rename (hashing may take long): a lease's
            ``check``. What it raises stops the publication.

    Returns:
        ``final`` as a Path.

    Raises:
        DiskFullError: No space is left; ``tmp`` stays without a mark.
    """
    tmp, final = Path(tmp), Path(final)
    seal(tmp)
    if before_rename is not None:
        before_rename()
    aside = final.with_name(final.name + ".old")
    try:
        os.rename(tmp, final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not replace:
            raise FileExistsError(errno.EEXIST, "there is a published folder already", os.fspath(final)) from error
        remove_folder(aside)
        os.rename(final, aside)
        os.rename(tmp, final)
    fsync_folder(final.parent)
    if tmp.parent != final.parent:
        fsync_folder(tmp.parent)
    remove_folder(aside)
    return final


def newest_whole(parent: PathLike, pattern: str = "step-*") -> tuple[Path | None, list[str]]:
    """The newest folder below ``parent`` that verifies in full, and why newer ones were passed over.

    "Newest" is by the numbers in the names. Folders that end in ``.tmp`` are unfinished by design and not mentioned.

    Returns:
        ``(folder or None, ["step-000200: model.safetensors: its SHA-256 is not ...", ...])``.
    """
    passed_over: list[str] = []
    for folder in _candidates(Path(parent), pattern):
        faults = verify(folder)
        if not faults:
            return folder, passed_over
        passed_over.append(f"{folder.name}: {'; '.join(faults)}")
    return None, passed_over


def _candidates(parent: Path, pattern: str) -> list[Path]:
    """Folders that match, newest first; of one number the one in place before the one moved aside."""
    if not parent.is_dir():
        return []
    folders = [
        path
        for path in parent.iterdir()
        if fnmatch.fnmatchcase(path.name, pattern)
        and not path.name.endswith(".tmp")
        and path.is_dir()
        and not path.is_symlink()
    ]
    return sorted(folders, key=_age, reverse=True)


def _age(folder: Path) -> tuple[list[int], bool, str]:
    return [int(digits) for digits in re.findall(r"\d+", folder.name)], not folder.name.endswith(".old"), folder.name


def prune(parent: PathLike, keep: int, pattern: str = "step-*", protect: Collection[str] = ()) -> list[Path]:
    """Deletes what is older than the ``keep`` newest whole folders, marks first: half a folder never verifies.

    A damaged folder does not count as one that is kept, so the last whole one is never deleted for it. Whole means
    here: marked, and all sizes and times as sealed.

    Args:
        parent: The folder of folders.
        keep: How many to keep, at least 1.
        pattern: Which folders are meant.
        protect: Names never deleted (the best one, one that somebody reads).

    Returns:
        What was deleted, oldest first.
    """
    if keep < 1:
        raise ValueError(f"keep={keep} would delete every checkpoint; give 1 or more.")
    kept, doomed = 0, []
    for folder in _candidates(Path(parent), pattern):
        if kept >= keep:
            doomed.append(folder)
        elif not verify(folder, full=False):
            kept += 1
    removed = [folder for folder in reversed(doomed) if folder.name not in protect]
    for folder in removed:
        remove_folder(folder)
    return removed


def remove_folder(folder: PathLike) -> None:
    """Deletes a folder, its mark first; no error if there is none."""
    folder = Path(folder)
    try:
        os.unlink(folder / MARK)
        fsync_folder(folder)
    except FileNotFoundError:
        pass
    if folder.exists():
        shutil.rmtree(folder)
