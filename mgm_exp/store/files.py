"""Files that are written whole or not at all, and links that share bytes between a store and a run folder."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from mgm_exp.errors import DiskFullError

PathLike = str | os.PathLike[str]

# A kill may leave one of these behind; whoever owns the folder next may delete it.
TEMPORARY = re.compile(r"^\.tmp-[0-9a-f]{16}$")
# What an NFS client makes of a file that is deleted while it is open; it goes when it is closed.
_STILL_OPEN = re.compile(r"^\.nfs[0-9a-f]{16,}$")

_FULL = {errno.ENOSPC, errno.EDQUOT}
_NO_FOLDER_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}  # file systems that cannot fsync a folder say so
_NO_HARD_LINK = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
# What the libraries say that hide the errno: safetensors, sqlite3, torch.save.
_FULL_IN_WORDS = re.compile(
    r"no space left on device|os error 28|database or disk is full|inline_container.*unexpected pos",
    re.IGNORECASE | re.DOTALL,
)


def write_atomic(path: PathLike, data: bytes | str) -> None:
    """Writes ``path`` so that a reader, or a crash at any instant, sees the old content or the new one, never a part.

    The bytes go to a file beside it, which is fsynced and renamed over ``path``; then the folder is fsynced. Text is
    UTF-8.

    Raises:
        DiskFullError: No space is left; the old content is still there and nothing half-written is.
        OSError: Any other failure to write, with the same guarantee.
    """
    path = Path(path)
    raw = data.encode("utf-8") if isinstance(data, str) else data
    temporary = path.parent / temporary_name()
    with disk_full_named(path, len(raw)):
        try:
            write_new(temporary, raw)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        fsync_folder(path.parent)


def write_json_atomic(path: PathLike, obj: object, *, indent: int | None = 2) -> None:
    """``write_atomic`` of ``obj`` as strict JSON.

    Raises:
        ValueError: A number is NaN or infinite, which JSON does not know; the message says where.
        DiskFullError: As ``write_atomic``.
    """
    write_atomic(path, encode_json(obj, Path(path).name, indent=indent))


def encode_json(obj: object, name: str = "value", *, indent: int | None = 2) -> bytes:
    """Strict JSON as UTF-8 with a final newline; ``name`` is how an error calls the whole."""
    try:
        text = json.dumps(obj, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        place = next(_not_finite(obj, name), None)
        if place is None:
            raise
        raise ValueError(f"{place} is not finite and cannot be written as JSON; write null or leave it out.") from error
    try:
        return text.encode("utf-8") + b"\n"
    except UnicodeEncodeError:  # a lone surrogate: the same JSON value, in escapes
        return json.dumps(obj, indent=indent, ensure_ascii=True, allow_nan=False).encode("ascii") + b"\n"


def read_json(path: PathLike) -> Any:
    """The JSON value in a file. Raises ValueError for what is not strict JSON (NaN, Infinity, torn text, not UTF-8)."""
    return parse_json(Path(path).read_bytes())


def parse_json(raw: bytes) -> Any:
    """``read_json`` of bytes."""
    try:
        return json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply to be JSON of ours") from error


def _refuse_constant(word: str) -> object:
    raise ValueError(f"{word} is not JSON")


def _not_finite(obj: object, place: str) -> Iterator[str]:
    if isinstance(obj, float) and not math.isfinite(obj):
        yield f"{place}: {obj!r}"
    elif isinstance(obj, Mapping):
        for key, value in obj.items():
            yield from _not_finite(value, f"{place}.{key}")
    elif isinstance(obj, (list, tuple)):
        for index, value in enumerate(obj):
            yield from _not_finite(value, f"{place}[{index}]")


def temporary_name() -> str:
    """A fresh name for a file beside its target; independent of the target's, which may have all of 255 bytes."""
    return f".tmp-{secrets.token_hex(8)}"


def write_new(path: PathLike, raw: bytes) -> None:
    """Creates ``path`` (which must not exist) with ``raw`` in it, fsynced. The folder is not fsynced."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        view = memoryview(raw)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(folder: PathLike) -> None:
    """Makes what was created, renamed or removed in ``folder`` survive a power cut, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_FSYNC:
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_full_named(path: PathLike, needed_bytes: int | None = None) -> Iterator[None]:
    """Turns every way of saying "no space left" (errno, safetensors, sqlite3, torch.save) into one DiskFullError.

    Args:
        path: What was being written, for the message.
        needed_bytes: Its size, where it is known.
    """
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        in_words = not isinstance(error, OSError) and _FULL_IN_WORDS.search(str(error))
        if not in_words and not (isinstance(error, OSError) and error.errno in _FULL):
            raise
        needed = "" if needed_bytes is None else f" ({needed_bytes:,} bytes)"
        raise DiskFullError(
            f"No space is left to write {os.fspath(path)}{needed}; {_free(path)}.",
            advice="Free some space (`mgm-exp gc` drops unused store entries) and give the same command again: "
            "what was complete before is still complete, and the run continues from there.",
        ) from error


def _free(path: PathLike) -> str:
    folder = Path(path)
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    try:
        return f"{shutil.disk_usage(folder).free:,} bytes are free there (a quota may be lower)"
    except OSError as error:
        return f"the free space could not be read ({error})"


def hard_link_or_copy(source: PathLike, target: PathLike) -> Literal["link", "copy"]:
    """Makes ``target`` the same file as ``source``, or a copy where a hard link cannot be made; never a symbolic link.

    An existing ``target`` is replaced atomically. A hard link shares its bytes with the source: to change the file,
    write a new one and rename it over (``write_atomic``), never append or edit in place.

    Returns:
        What was done.
    """
    source, target = Path(os.path.realpath(source)), Path(target)
    if target.exists() and not target.is_symlink() and os.path.samefile(source, target):
        return "link"  # rename() of one hard link over another is a no-op that would leave the temporary name
    temporary = target.parent / temporary_name()
    with disk_full_named(target):
        try:
            how = _link(source, temporary) or _copy(source, temporary)
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
    return how


def _link(source: Path, target: Path) -> Literal["link"] | None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_HARD_LINK:
            raise
        return None
    return "link"


def _copy(source: Path, target: Path) -> Literal["copy"]:
    shutil.copy2(source, target)
    fsync_file(target)
    return "copy"


def fsync_file(path: PathLike) -> None:
    """Makes the bytes of a file that somebody else wrote survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_tree(source: PathLike, target: PathLike) -> None:
    """``hard_link_or_copy`` of every file below the folder ``source`` to the same place below ``target``.

    A ``target`` that does not exist appears at once, whole (it is built in ``<target>.tmp``). Into an existing one the
    files are linked one by one; files that are only there stay.

    Raises:
        ValueError: There is a symbolic link or a special file below ``source``.
    """
    source, target = Path(source), Path(target)
    if target.exists():
        _link_files(source, target)
        return
    unfinished = target.with_name(target.name + ".tmp")
    if unfinished.exists():  # of an attempt that was killed
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    _link_files(source, unfinished)
    os.rename(unfinished, target)
    fsync_folder(target.parent)


def _link_files(source: Path, target: Path) -> None:
    for relative in regular_files(source):
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        hard_link_or_copy(source / relative, target / relative)


def regular_files(folder: PathLike) -> list[str]:
    """Relative POSIX paths of all files below ``folder``, sorted; without those that NFS keeps though they are deleted.

    Raises:
        ValueError: There is a symbolic link, or something that is neither a file nor a folder.
    """
    found: list[str] = []
    pending = [""]
    while pending:
        prefix = pending.pop()
        with os.scandir(os.path.join(folder, prefix)) as listing:
            for item in listing:
                relative = prefix + item.name
                if _STILL_OPEN.match(item.name):
                    continue
                if item.is_dir(follow_symlinks=False):
                    pending.append(relative + "/")
                elif item.is_file(follow_symlinks=False):
                    found.append(relative)
                else:
                    kind = "a symbolic link" if item.is_symlink() else "neither a file nor a folder"
                    raise ValueError(f"{os.path.join(folder, relative)} is {kind}; only plain files belong here.")
    return sorted(found)
