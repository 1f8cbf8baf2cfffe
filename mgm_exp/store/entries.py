"""The store: outputs of stages, addressed by everything that determines them, made once and shared."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgm_exp.errors import LeaseLost, UserError

from .claims import TTL_S, utc_now
from .collection import Collector, Dropped
from .files import PathLike, encode_json, fsync_folder, read_json, regular_files, temporary_name, write_json_atomic
from .layout import OUT, RECORD, beside, is_name, stored_folders
from .lease import GRACE_S, Lease
from .mirror import Mirror
from .mounts import is_shared, see_anew
from .sealed import MARK, publish_folder, remove_folder, verify
from .work import ATTEMPTS, Clock, adopt_work

_log = logging.getLogger(__name__)

SCHEMA_VERSION = 1


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


class Store:
    """A folder of published stage outputs.

    Args:
        root: The store's folder, made as needed.
        ttl_s: See ``Lease``; the same for all who share the store.
        grace_s: See ``Lease``.
        mirror: Where copies are kept for other machines: looked at before something is made, and filled after.
    """

    def __init__(
        self, root: PathLike, *, ttl_s: float = TTL_S, grace_s: float = GRACE_S, mirror: Mirror | None = None
    ) -> None:
        self.root, self.mirror = Path(root).absolute(), mirror
        self.ttl_s, self.grace_s = ttl_s, grace_s

    def folder(self, stage: str, key: str) -> Path:
        """Where an entry lies once it is published.

        Raises:
            ValueError: A name that could lead elsewhere, or that is one of the store's own.
            UserError: The stage's folder is a link that leads out of the store.
        """
        for name in (stage, key):
            if not is_name(name):
                raise ValueError(f"{name!r} cannot name a stage or a key: letters, digits, '.', '_' and '-' can.")
        path = self.root / stage / key
        if os.path.realpath(path) != os.path.join(os.path.realpath(self.root), stage, key):
            raise UserError(f"{path} is a link that leads out of the store.", advice="Remove the link.")
        return path

    def lease(self, stage: str, key: str) -> Lease:
        """The lease of an entry, not acquired."""
        return Lease(beside(self.folder(stage, key), "lease"), ttl_s=self.ttl_s, grace_s=self.grace_s)

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
        for stage, key, kind, path in stored_folders(self.root):
            if kind == "entry":
                try:
                    yield _read_entry(path)
                except (OSError, ValueError, KeyError, TypeError) as error:
                    _log.warning("%s/%s has no readable record (%s)", stage, key, error)

    def keys(self, stage: str, prefix: str = "") -> list[str]:
        """Keys of a stage's published entries that begin with ``prefix``, in order; their content is not looked at.

        Raises:
            ValueError: As ``folder``.
        """
        folder = self.folder(stage, prefix or "any").parent
        if not folder.is_dir():
            return []
        with os.scandir(folder) as listing:
            return sorted(item.name for item in listing if item.name.startswith(prefix) and is_name(item.name))

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
        clock = Clock()
        lease = Lease(beside(final, "lease"), ttl_s=self.ttl_s, grace_s=self.grace_s, on_beat=clock.save)
        lease.acquire(on_wait=on_wait)
        is_done = False
        try:
            if is_shared(self.root):
                see_anew(final)
            entry, faults = self._look_up(stage, key, full=verify)  # somebody may have made it while we waited
            is_reused = entry is not None and self.touch(entry)
            if faults:
                self._move_aside(final, faults)
            if not is_reused and self._fetch(final, lease):
                is_reused = True
            if not is_reused:
                self._make(final, make, dict(inputs), lease, clock)
            output = _output(_read_entry(final), is_reused)
            is_done = True
        finally:
            lease.release(forget=is_done)
        if self.mirror is not None and not is_reused:
            self.mirror.push(stage, key, final)
        return output

    def _fetch(self, final: Path, lease: Lease) -> bool:
        """Publishes the mirror's copy, if it has a whole one."""
        if self.mirror is None:
            return False
        # By this name the next collection deletes what a kill leaves of it.
        fetched = beside(final, f"trash-{temporary_name().rpartition('-')[2]}")
        if not self.mirror.fetch(final.parent.name, final.name, fetched):
            return False
        lease.check()
        os.rename(fetched, final)
        fsync_folder(final.parent)
        try:
            _read_entry(final)
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._move_aside(final, [f"{RECORD}: not the record of this entry ({error})"])
            return False
        _protect(final)
        remove_folder(beside(final, "work"))  # of an attempt that is not needed any more
        return True

    def _move_aside(self, final: Path, faults: list[str]) -> None:
        number = 1
        while (aside := beside(final, f"damaged-{number}")).exists():
            number += 1
        try:
            os.rename(final, aside)
        except FileNotFoundError:  # collected on another machine, and remembered by this one
            return
        _log.warning("%s was damaged (%s): moved to %s, made again", final, "; ".join(faults), aside.name)

    def _make(
        self,
        final: Path,
        make: Callable[[Path], Mapping[str, Any] | None],
        inputs: dict[str, Any],
        lease: Lease,
        clock: Clock,
    ) -> None:
        record = {"schema_version": SCHEMA_VERSION, "stage": final.parent.name, "key": final.name, "inputs": inputs}
        encode_json(record, RECORD)  # what cannot be recorded should fail before hours of work, not after
        work = adopt_work(final, lease)
        out = work / OUT
        if verify(out):  # else: killed between sealing and renaming, and there is nothing left to make
            out.mkdir(exist_ok=True)
            for leftover in (MARK, RECORD):
                (out / leftover).unlink(missing_ok=True)
            clock.start(work / ATTEMPTS)
            try:
                meta = dict(make(work) or {})
            except FileNotFoundError:  # a new owner has taken the folder: say so, and not which file is missing
                lease.check()
                raise
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
            if verify(final, full=False):  # else a file server renamed it, lost its answer, and was asked again
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
        return Collector(self.root, self.lease, older_than_s, dry_run).collect(keep_keys)


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


def _protect(folder: Path) -> None:
    """Takes the write permission from files: run folders hard-link them, and an edit there would change the store's."""
    for relative in regular_files(folder):
        path = folder / relative
        path.chmod(path.stat().st_mode & ~0o222)
