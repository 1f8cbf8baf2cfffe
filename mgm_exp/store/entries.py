"""The store: outputs of stages, addressed by everything that determines them, made once and shared.

<root>/<stage>/<key>/            published: what the stage made, its record `stage.json`, its mark `MANIFEST.json`
<root>/<stage>/<key>.work/       being made: scratch and checkpoints; `out/` is what will be published
<root>/<stage>/<key>.lease/      who makes it
<root>/<stage>/<key>.damaged-1/  was published, did not verify, moved aside
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgm_exp.errors import DiskFullError, LeaseLost, UserError

from .claims import TTL_S, utc_now
from .files import PathLike, encode_json, read_json, regular_files, temporary_name, write_json_atomic
from .lease import GRACE_S, Lease, LeaseHeld
from .sealed import MARK, publish_folder, remove_folder, verify

_log = logging.getLogger(__name__)

RECORD = "stage.json"
OUT = "out"
SCHEMA_VERSION = 1
_ATTEMPTS = "attempts.json"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")
_OURS = re.compile(r"(?P<key>.+?)\.(?P<kind>work|lease|damaged|trash)(?:-(?P<number>[0-9a-f]+))?")


@dataclass(frozen=True)
class Entry:
    """A published stage output.

    Attributes:
        stage: Stage name.
        key: Stage key.
        path: The folder with the output; read-only by convention: link or copy from it, never write into it.
        seconds: What making it took, over all attempts.
        meta: What the stage said about itself.
        inputs: What went into the key, and what was recorded beside it (packages, git).
        created_at: When it was published, UTC.
    """

    stage: str
    key: str
    path: Path
    seconds: float
    meta: dict[str, Any]
    inputs: dict[str, Any]
    created_at: str

    @property
    def last_used(self) -> float:
        """Seconds since the epoch."""
        return self.path.stat().st_mtime


@dataclass(frozen=True)
class StageOutput:
    """What ``Store.produce`` hands back; ``seconds``, ``meta`` and ``inputs`` are those of making, also when reused."""

    path: Path
    key: str
    reused: bool
    seconds: float
    meta: dict[str, Any]
    stage: str
    inputs: dict[str, Any]


@dataclass(frozen=True)
class Dropped:
    """Something that ``Store.gc`` dropped, or would drop.

    Attributes:
        path: The folder.
        kind: ``entry``, ``work`` (of a stage nobody finished), ``damaged``, ``trash`` (of an interrupted deletion) or
            ``lease``.
        size: Bytes on disk that only it held: files with other hard links do not count.
        idle_s: Seconds since it was last used.
    """

    path: Path
    kind: str
    size: int
    idle_s: float


class Store:
    """A folder of published stage outputs.

    Args:
        root: The store's folder, made as needed.
        ttl_s: See ``Lease``; the same for all who share the store.
        grace_s: See ``Lease``.
    """

    def __init__(self, root: PathLike, *, ttl_s: float = TTL_S, grace_s: float = GRACE_S) -> None:
        self.root = Path(root).absolute()
        self.ttl_s, self.grace_s = ttl_s, grace_s

    def folder(self, stage: str, key: str) -> Path:
        """Where an entry lies once it is published.

        Raises:
            ValueError: A name that could lead elsewhere, or that is one of the store's own.
            UserError: The stage's folder is a link that leads out of the store.
        """
        for name in (stage, key):
            if not _NAME.fullmatch(name) or _OURS.fullmatch(name):
                raise ValueError(f"{name!r} cannot name a stage or a key: letters, digits, '.', '_' and '-' can.")
        path = self.root / stage / key
        if os.path.realpath(path) != os.path.join(os.path.realpath(self.root), stage, key):
            raise UserError(f"{path} is a link that leads out of the store.", advice="Remove the link.")
        return path

    def lease(self, stage: str, key: str) -> Lease:
        """The lease of an entry, not acquired."""
        return Lease(_beside(self.folder(stage, key), "lease"), ttl_s=self.ttl_s, grace_s=self.grace_s)

    def entry(self, stage: str, key: str, *, verify: bool = False) -> Entry | None:
        """The published entry if there is one and it is whole.

        A damaged one is reported in the log and counts as none; ``produce`` moves it aside and makes it again.

        Args:
            stage: Stage name.
            key: Stage key.
            verify: Hash every file. Otherwise only files whose modification time has changed are hashed, and of the
                others the size is compared.
        """
        entry, faults = self._look_up(stage, key, full=verify)
        if faults:
            _log.warning("%s is damaged (%s); it is not used", self.folder(stage, key), "; ".join(faults))
        return entry

    def _look_up(self, stage: str, key: str, *, full: bool) -> tuple[Entry | None, list[str]]:
        path = self.folder(stage, key)
        if not path.is_dir():
            return None, []
        faults = verify(path, full=full)
        if not faults:
            try:
                return _read_entry(path), []
            except (OSError, ValueError, KeyError, TypeError) as error:
                faults = [f"{RECORD}: not the record of this entry ({error})"]
        return None, faults if path.is_dir() else []  # collected by somebody while we looked

    def entries(self) -> Iterator[Entry]:
        """All published entries that have a readable record; their content is not verified."""
        for stage, key, kind, path in self._folders():
            if kind == "entry":
                try:
                    yield _read_entry(path)
                except (OSError, ValueError, KeyError, TypeError) as error:
                    _log.warning("%s/%s has no readable record (%s)", stage, key, error)

    def produce(
        self,
        stage: str,
        key: str,
        make: Callable[[Path], Mapping[str, Any] | None],
        *,
        inputs: Mapping[str, Any],
        on_wait: Callable[[str], None] | None = None,
        verify: bool = False,
    ) -> StageOutput:
        """The output of a stage: the published one, or made now, by exactly one process at a time.

        ``make(work)`` gets a folder that survives crashes and failures, so that it can continue where the attempt
        before it stopped: checkpoints and scratch go anywhere in it, the output into ``work/out/`` (which exists). What
        it returns is recorded as ``meta``. If it raises, nothing is published and the folder stays for the next time.

        Args:
            stage: Stage name.
            key: Stage key (``stage_key``).
            make: Makes the output; called at most once.
            inputs: Recorded in ``stage.json``: what the key was made of, packages, git.
            on_wait: Called with a sentence while another process makes this entry.
            verify: As for ``entry``.

        Raises:
            LeaseLost: Another machine took over while ``make`` ran; nothing was published.
            DiskFullError: No space to publish; the work folder stays.
        """
        entry = self.entry(stage, key, verify=verify)
        if entry is not None and self.touch(entry):
            return _output(entry, is_reused=True)
        final = self.folder(stage, key)
        clock = _Clock()
        lease = Lease(_beside(final, "lease"), ttl_s=self.ttl_s, grace_s=self.grace_s, on_beat=clock.save)
        lease.acquire(on_wait=on_wait)
        is_done = False
        try:
            entry, faults = self._look_up(stage, key, full=verify)  # somebody may have made it while we waited
            is_reused = entry is not None and self.touch(entry)
            if faults:
                self._move_aside(final, faults)
            if not is_reused:
                self._make(final, make, dict(inputs), lease, clock)
            output = _output(_read_entry(final), is_reused)
            is_done = True
        finally:
            lease.release(forget=is_done)
        return output

    def _move_aside(self, final: Path, faults: list[str]) -> None:
        number = 1
        while (aside := _beside(final, f"damaged-{number}")).exists():
            number += 1
        os.rename(final, aside)
        _log.warning("%s was damaged (%s): moved to %s, made again", final, "; ".join(faults), aside.name)

    def _make(
        self,
        final: Path,
        make: Callable[[Path], Mapping[str, Any] | None],
        inputs: dict[str, Any],
        lease: Lease,
        clock: _Clock,
    ) -> None:
        record = {"schema_version": SCHEMA_VERSION, "stage": final.parent.name, "key": final.name, "inputs": inputs}
        encode_json(record, RECORD)  # what cannot be recorded should fail before hours of work, not after
        work = _adopt_work(final, lease)
        out = work / OUT
        if verify(out):  # else: killed between sealing and renaming, and there is nothing left to make
            out.mkdir(exist_ok=True)
            for leftover in (MARK, RECORD):
                (out / leftover).unlink(missing_ok=True)
            clock.start(work / _ATTEMPTS)
            try:
                meta = dict(make(work) or {})
            finally:
                clock.stop()
            if (out / RECORD).exists() or (out / MARK).exists():
                raise ValueError(f"{out} holds a {RECORD} or {MARK}; the store writes these itself: use another name.")
            record |= {"meta": meta, "seconds": clock.seconds, "attempts": clock.attempts, "created_at": utc_now()}
            write_json_atomic(out / RECORD, record)
        lease.check()
        try:
            publish_folder(out, final, replace=False, before_rename=lease.check)
        except FileNotFoundError as error:  # a new owner renamed our work folder: the other half of the fence
            lease.check()
            raise LeaseLost(f"{work} is gone.") from error
        except FileExistsError:
            _log.warning("%s was published by an earlier owner meanwhile", final)
        _protect(final)
        try:
            remove_folder(work)
        except OSError as error:  # published is published; gc tries again
            _log.warning("%s cannot be removed now (%s)", work, error)

    def touch(self, entry: Entry) -> bool:
        """Notes that an entry was used now, which keeps it from ``gc``; False if it is not there any more."""
        try:
            os.utime(entry.path)
        except FileNotFoundError:
            return False
        except OSError as error:  # a store of somebody else, or read-only: it can be used all the same
            _log.debug("%s: the last use cannot be noted (%s)", entry.path, error)
        return True

    def gc(
        self, keep_keys: Collection[str] = (), older_than_s: float = 7 * 86_400.0, dry_run: bool = False
    ) -> list[Dropped]:
        """Drops what nobody used for a while. Nothing whose lease is held is touched.

        Run folders hold hard links or copies of what they need and lose nothing; what is dropped is made again when a
        run asks for it. Entries go, work folders of stages that nobody finished, damaged entries, and at once what a
        crash left behind: half-deleted folders and the work folder of an entry that is published.

        Args:
            keep_keys: Keys, or ``stage/key``, that stay whatever their age.
            older_than_s: Seconds since the last use.
            dry_run: Only say what would be dropped.

        Returns:
            What was dropped, oldest first.
        """
        dropped = []
        for stage, key, kind, path in self._folders():
            if key in keep_keys or f"{stage}/{key}" in keep_keys:
                continue
            found = self._collect(stage, key, kind, path, older_than_s, dry_run)
            if found is not None:
                dropped.append(found)
        return sorted(dropped, key=lambda item: -item.idle_s)

    def _collect(
        self, stage: str, key: str, kind: str, path: Path, older_than_s: float, dry_run: bool
    ) -> Dropped | None:
        is_leftover = kind == "trash" or (kind in ("work", "lease") and (self.root / stage / key / MARK).exists())
        limit_s = 0.0 if is_leftover else older_than_s
        try:
            idle_s = _idle_s(path)
            if idle_s < limit_s or (kind == "lease" and any(path.parent.glob(f"{key}.work*"))):
                return None
            lease = self.lease(stage, key)
            if dry_run:
                return None if lease.holder() else Dropped(path, kind, _own_bytes(path), idle_s)
            lease.acquire(wait=False)
        except (LeaseHeld, FileNotFoundError):
            return None
        try:
            if kind != "lease" and (not path.is_dir() or _idle_s(path) < limit_s):
                return None  # used, or dropped by another collector, before we had the lease
            found = Dropped(path, kind, _own_bytes(path), idle_s)
            if kind == "entry":
                trash = _beside(path, f"trash-{temporary_name().rpartition('-')[2]}")
                os.rename(path, trash)  # from here on it is not published
                if _idle_s(trash) < limit_s:  # touched in the instant before
                    os.rename(trash, path)
                    return None
                path = trash
            if kind != "lease":
                remove_folder(path)
            return found
        finally:
            lease.release(forget=True)

    def _folders(self) -> Iterator[tuple[str, str, str, Path]]:
        """(stage, key, kind, path) of everything in the store."""
        if not self.root.is_dir():
            return
        for stage in sorted(self.root.iterdir()):
            if not _NAME.fullmatch(stage.name) or stage.is_symlink() or not stage.is_dir():
                continue
            for path in sorted(stage.iterdir()):
                match = _OURS.fullmatch(path.name)
                key, kind = (match["key"], match["kind"]) if match else (path.name, "entry")
                if _NAME.fullmatch(key) and not path.is_symlink() and path.is_dir():
                    yield stage.name, key, kind, path


class _Clock:
    """Time spent in ``make`` over all attempts, also those that were killed: saved with each heartbeat."""

    def __init__(self) -> None:
        self.seconds, self.attempts = 0.0, 0
        self._before, self._started = 0.0, 0.0
        self._file: Path | None = None

    def start(self, file: Path) -> None:
        try:
            saved = read_json(file)
            self._before, self.attempts = float(saved["seconds"]), int(saved["attempts"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            self._before, self.attempts = 0.0, 0
        self.attempts += 1
        self._started, self._file = time.monotonic(), file
        self.save()

    def save(self) -> None:
        if self._file is None:
            return
        self.seconds = self._before + time.monotonic() - self._started
        try:
            write_json_atomic(self._file, {"seconds": self.seconds, "attempts": self.attempts})
        except (OSError, DiskFullError) as error:  # a record of time is no reason to stop the work it measures
            _log.warning("%s", error)

    def stop(self) -> None:
        self.save()
        self._file = None


def lease_of(work: PathLike) -> Path:
    """The lease folder that guards a work folder of the store: what a worker process hands to ``hold_shared``."""
    work = Path(work)
    match = _OURS.fullmatch(work.name)
    if match is None or match["kind"] != "work":
        raise ValueError(f"{work} is not a work folder of the store (<key>.work).")
    return work.with_name(f"{match['key']}.lease")


def _beside(final: Path, kind: str) -> Path:
    return final.with_name(f"{final.name}.{kind}")


def _output(entry: Entry, is_reused: bool) -> StageOutput:
    return StageOutput(entry.path, entry.key, is_reused, entry.seconds, entry.meta, entry.stage, entry.inputs)


def _read_entry(path: Path) -> Entry:
    record = read_json(path / RECORD)
    if (record["stage"], record["key"]) != (path.parent.name, path.name):
        raise ValueError(f"it is the record of {record['stage']}/{record['key']}")
    return Entry(
        record["stage"],
        record["key"],
        path,
        float(record["seconds"]),
        dict(record["meta"]),
        dict(record["inputs"]),
        str(record["created_at"]),
    )


def _adopt_work(final: Path, lease: Lease) -> Path:
    """The work folder, new or of an earlier attempt.

    An earlier owner that is known to be dead left it as it is. One that was only not heard of (on another machine) may
    wake up and go on writing: its folder gets a new name, so that its paths lead nowhere, and its files new bytes on
    disk, so that what it has open is no longer part of it.
    """
    plain = _beside(final, "work")
    found = [path for path in final.parent.glob(f"{final.name}.work*") if path == plain or _number(path)]
    work = max(found, key=_number, default=plain)
    for older in found:
        if older != work:
            remove_folder(older)
    if lease.took_over_expired and work.is_dir():
        fenced = _beside(final, f"work-{max(lease.token, _number(work) + 1):06x}")
        os.rename(work, fenced)
        work = fenced
        for parent, _, names in os.walk(work):
            for name in names:
                path, temporary = Path(parent, name), Path(parent, temporary_name())
                shutil.copy2(path, temporary, follow_symlinks=False)
                os.replace(temporary, path)
    work.mkdir(parents=True, exist_ok=True)
    return work


def _number(work: Path) -> int:
    match = _OURS.fullmatch(work.name)
    return int(match["number"], 16) if match and match["number"] else 0


def _protect(folder: Path) -> None:
    """Takes the write permission from files: run folders hard-link them, and an edit there would change the store's."""
    for relative in regular_files(folder):
        path = folder / relative
        path.chmod(path.stat().st_mode & ~0o222)


def _idle_s(path: Path) -> float:
    """Seconds since a folder or, for a work folder, anything in it was last changed or touched."""
    newest = path.stat().st_mtime
    if not (path / MARK).exists():
        for parent, folders, files in os.walk(path):
            for name in (*folders, *files):
                newest = max(newest, os.lstat(os.path.join(parent, name)).st_mtime)
    return max(0.0, time.time() - newest)


def _own_bytes(path: Path) -> int:
    total = 0
    for parent, _, files in os.walk(path):
        for name in files:
            facts = os.lstat(os.path.join(parent, name))
            total += facts.st_blocks * 512 if facts.st_nlink == 1 else 0
    return total
