"""Published entries in an object store (S3, GCS, Azure, a web disk, a folder), for machines that share no disk.

    <mirror>/<stage>/<key>/<digest>/...        the entry's files
    <mirror>/<stage>/<key>/MANIFEST.json       its mark, uploaded last: an entry is there when this is

An object store has no rename and no links, but an object is there whole or not at all. So the files lie below the
manifest's own digest, where two uploads of different content never mix, and the mark that names them comes last: of two
uploads at once the later mark counts, and both are whole. What is fetched is verified, file by file, against the mark.

Credentials are fsspec's business (environment, the cloud's own files), never the configuration's.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

from mgm_exp.errors import ConfigError, MgmError, MissingDependencyError

from .files import fsync_folder
from .sealed import MARK, parse_mark, read_mark, remove_folder, verify

_log = logging.getLogger(__name__)

_AWAY = "the mirror {url} does not answer ({error})"


class Mirror:
    """Where copies of entries are kept.

    Args:
        url: ``s3://bucket/folder``, ``gs://...``, ``file:///folder``: whatever fsspec knows.

    Raises:
        ConfigError: no protocol that fsspec knows, or a password in it.
        MissingDependencyError: fsspec, or its part for this protocol, is not installed.
    """

    def __init__(self, url: str) -> None:
        _, mark, rest = url.partition("://")
        if not mark or not rest or "@" in rest or "?" in rest:
            raise ConfigError(
                "paths.mirror is a place such as s3://BUCKET/FOLDER or file:///FOLDER, without a user or password.",
                advice="Credentials belong into the environment or the files of the cloud's own tools.",
            )
        try:
            import fsspec
        except ImportError as error:
            raise MissingDependencyError("paths.mirror needs fsspec.", advice="pip install fsspec") from error
        try:
            self._system, self._root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except ImportError as error:
            raise MissingDependencyError(
                f"paths.mirror={url} needs a package that is not installed ({error}).",
                advice="s3:// needs s3fs, gs:// gcsfs, az:// adlfs.",
            ) from error
        except ValueError as error:
            raise ConfigError(f"paths.mirror={url}: {error}.") from error
        self.url = url

    def fetch(self, stage: str, key: str, folder: Path) -> bool:
        """Brings an entry, if the mirror has it and it is whole.

        Args:
            folder: Where its files go; must not exist; there is none afterwards if there is no entry.

        Returns:
            Whether it is there now, sealed and verified.
        """
        place = f"{self._root}/{stage}/{key}"
        try:
            raw = self._read(f"{place}/{MARK}")
            if raw is None:
                return False
            files, digest = parse_mark(raw)
            for name, facts in files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                self._download(f"{place}/{digest}/{name}", folder / name, facts)
            (folder / MARK).write_bytes(raw)
        except MgmError:  # a signal, which asks for an end
            remove_folder(folder)
            raise
        except ValueError as error:
            _log.warning("%s/%s/%s is damaged (%s); it is not used", self.url, stage, key, error)
            remove_folder(folder)
            return False
        except Exception as error:  # noqa: BLE001 - every protocol has its own; without the mirror the stage is made
            _log.warning("%s; %s/%s is not fetched", _AWAY.format(url=self.url, error=error), stage, key)
            remove_folder(folder)
            return False
        faults = verify(folder)
        if faults:
            _log.warning("%s/%s/%s is damaged (%s); it is not used", self.url, stage, key, "; ".join(faults))
            remove_folder(folder)
            return False
        for parent, _, _ in os.walk(folder):
            fsync_folder(parent)
        return True

    def _read(self, path: str) -> bytes | None:
        try:
            found: bytes = self._system.cat_file(path)
        except FileNotFoundError:
            return None
        return found

    def _download(self, source: str, target: Path, facts: dict[str, Any]) -> None:
        """A file that is exactly as the mark says, with its time, so that a look-up need not hash it again."""
        digest, size = hashlib.sha256(), 0
        try:
            with self._system.open(source, "rb") as remote, open(target, "xb") as local:
                while block := remote.read(1 << 22):
                    size += len(block)
                    if size > facts["size"]:
                        raise ValueError(f"{target.name}: longer than {facts['size']:,} bytes")
                    digest.update(block)
                    local.write(block)
                local.flush()
                os.fsync(local.fileno())
        except FileNotFoundError as error:
            raise ValueError(f"{target.name}: missing") from error
        if digest.hexdigest() != facts["sha256"]:
            raise ValueError(f"{target.name}: its SHA-256 is not the one in the manifest")
        os.utime(target, ns=(facts["mtime_ns"], facts["mtime_ns"]))

    def push(self, stage: str, key: str, folder: Path) -> bool:
        """Copies a published entry there, unless this very content is there already; whether it is there now."""
        place, raw = f"{self._root}/{stage}/{key}", (folder / MARK).read_bytes()
        try:
            if self._read(f"{place}/{MARK}") == raw:
                return True
            files, digest = read_mark(folder)
            for name in files:
                target = f"{place}/{digest}/{name}"
                self._system.makedirs(target.rpartition("/")[0], exist_ok=True)
                self._system.put_file(str(folder / name), target)
            self._system.pipe_file(f"{place}/{MARK}", raw)
        except MgmError:
            raise
        except Exception as error:  # noqa: BLE001 - every protocol has its own; the entry is published here all the same
            _log.warning("%s; %s/%s is not copied there", _AWAY.format(url=self.url, error=error), stage, key)
            return False
        return True
