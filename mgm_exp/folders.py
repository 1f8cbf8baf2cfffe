"""Where a run writes: its folder below ``paths.root``, and whether an unfinished run there is continued."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf.errors import OmegaConfBaseException

from mgm_exp import store
from mgm_exp.config import ExperimentConfig, PathsConfig, from_plain
from mgm_exp.errors import ConfigError
from mgm_exp.stages import config_hash
from mgm_exp.store import Lease, Mirror, Store, read_yaml

LEASE = ".lease"
GALLERIES = "galleries"
"""Pages of wrong answers, one a benchmark, in a run's folder."""
# A run that ended in one of these ways is done: the same command makes a new one.
DONE = ("completed", "pruned")


def run_folder(config: ExperimentConfig) -> Path:
    """The folder of a single run: the newest unfinished one of this name and configuration, or a new one, made here.

    A folder that a living process writes is passed over, so the same command given twice at once makes two runs.
    """
    parent = Path(config.paths.root).resolve() / "runs" / config.name
    writable(Path(config.paths.root))
    confined(parent, Path(config.paths.root), "name")
    return unfinished(parent, config_hash(config)) or _new_folder(parent)


def unfinished(parent: Path, wanted_hash: str) -> Path | None:
    """The newest folder in ``parent`` of this configuration, unless its run is done; None where there is none."""
    if not parent.is_dir():
        return None
    folders = (path for path in parent.iterdir() if path.is_dir() and not path.is_symlink())
    for folder in sorted(folders, reverse=True):
        if recorded_hash(folder) != wanted_hash:
            continue
        if Lease(folder / LEASE).holder() is not None:
            continue
        return None if read_record(folder / "result.json").get("status") in DONE else folder
    return None


def open_store(paths: PathsConfig) -> Store:
    """The store that a configuration names, with its mirror.

    Raises:
        ConfigError, MissingDependencyError: there can be no such mirror.
    """
    return Store(Path(paths.store), mirror=None if paths.mirror is None else Mirror(paths.mirror))


def wait_until_free(folder: Path, say: Callable[[str], None]) -> None:
    """Waits until nobody works in ``folder``: processes of an owner that was killed end, or are ended, first."""
    if (folder / LEASE).is_dir():
        lease = Lease(folder / LEASE)
        lease.acquire(on_wait=say)
        lease.release()


def recorded_hash(folder: Path) -> str | None:
    """The configuration's hash of the run in ``folder``; None where no run began."""
    written = read_record(folder / "manifest.json").get("config_hash")
    if written is not None:
        return str(written)
    try:  # killed before its manifest was written
        values = read_yaml(folder / "config.yaml")
        return config_hash(from_plain(values)) if isinstance(values, dict) else None
    except (FileNotFoundError, ValueError, ConfigError, OmegaConfBaseException):
        return None


def _new_folder(parent: Path) -> Path:
    """Makes ``<time>/``; making it is what claims it, so two commands of one second get two folders."""
    time = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    parent.mkdir(parents=True, exist_ok=True)
    for number in range(1, 1000):
        folder = parent / (time if number == 1 else f"{time}-{number:03d}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise ConfigError(f"{parent} holds a thousand runs of this second.", advice="Give the runs different names.")


def confined(folder: Path, root: Path, key: str) -> Path:
    """``folder`` with links resolved, if it lies below ``root``.

    Raises:
        ConfigError: it does not, so results would be written where ``paths.root`` does not say.
    """
    inside, resolved = root.resolve(), folder.resolve()
    if resolved == inside or inside not in resolved.parents:
        raise ConfigError(
            f"{key} leads to {resolved}, which is outside of paths.root={inside}; what a run writes lies below that.",
            advice="Choose another paths.root, or a name without links in its folder.",
        )
    return resolved


def writable(root: Path) -> None:
    """Makes ``paths.root``.

    Raises:
        ConfigError: it cannot be made or written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"paths.root={root} cannot be made ({error.strerror}); give another one.") from error
    if not os.access(root, os.W_OK | os.X_OK):
        raise ConfigError(f"paths.root={root} cannot be written by this user; give another one.")


def read_record(path: Path) -> dict[str, Any]:
    """A JSON object that a run wrote; empty where it is missing or was damaged from outside."""
    try:
        content = store.read_record(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
