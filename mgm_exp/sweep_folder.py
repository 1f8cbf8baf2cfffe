"""The folder of a sweep: where it lies, who may write it, and the record of a trial that could not start."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgm_exp.config import NAME
from mgm_exp.errors import ConfigError, Interrupted, MgmError, Pruned
from mgm_exp.folders import LEASE, confined, read_record, writable
from mgm_exp.store import Lease, LeaseHeld, write_atomic

if TYPE_CHECKING:
    from omegaconf import DictConfig

DefaultName = Callable[["DictConfig"], str]


@contextmanager
def open_sweep(tree: DictConfig, default_name: DefaultName) -> Iterator[tuple[Path, str]]:
    """The folder and the name of a sweep, while this process alone may write it.

    Args:
        tree: The composed tree of the fixed overrides.
        default_name: Its name where none is given, from that tree.

    Raises:
        ConfigError: the name is no folder name, or leads out of ``paths.root``.
        LeaseHeld: the same sweep is running already.
    """
    folder, name = make_folder(tree, default_name)
    lease = Lease(folder / LEASE)
    try:
        lease.acquire(wait=False)
    except LeaseHeld as error:
        raise LeaseHeld(
            f"The sweep {name} is running already: {error.message}",
            advice="Wait for it, or give sweep.name=ANOTHER to run a sweep of its own beside it.",
        ) from error
    try:
        yield folder, name
    finally:
        lease.release()


def make_folder(tree: DictConfig, default_name: DefaultName) -> tuple[Path, str]:
    """Makes the sweep's folder; gives it and the sweep's name.

    Raises:
        ConfigError: the name is no folder name, or leads out of ``paths.root``.
    """
    root = Path(str(tree.paths.root))
    folder, name = place(tree, default_name)
    writable(root)
    folder = confined(folder, root, "hydra.sweep.dir" if _asked_for_folder(tree) else "sweep.name")
    folder.mkdir(parents=True, exist_ok=True)
    return folder, name


def place(tree: DictConfig, default_name: DefaultName) -> tuple[Path, str]:
    """``<paths.root>/sweeps/<name>/`` (or ``hydra.sweep.dir`` where it is given) and the sweep's name.

    Raises:
        ConfigError: ``sweep.name`` is no folder name.
    """
    if _asked_for_folder(tree):
        folder = Path(str(tree.hydra.sweep.dir))
        return folder, tree.sweep.name or folder.name
    name = tree.sweep.name if tree.sweep.name is not None else default_name(tree)
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"sweep.name={name!r} is not a folder name: letters, digits and . _ = , + - are allowed, no slash."
        )
    return Path(str(tree.paths.root)) / "sweeps" / name, name


def _asked_for_folder(tree: DictConfig) -> bool:
    return any(str(item).lstrip("+").startswith("hydra.sweep.dir=") for item in tree.hydra.overrides.hydra)


def record_stop(run_dir: Path, reason: str, overrides: Sequence[str]) -> None:
    """Notes why a trial was interrupted by somebody else (its job was cancelled); the same command continues it."""
    from mgm_exp.record import explain, write_result

    error = Interrupted(reason, advice="The same command continues it.")
    result = read_record(run_dir / "result.json")
    if result.get("status") == "interrupted":
        write_result(run_dir, {**result, "error": explain(error)})
    else:
        record_failure(run_dir, error, overrides, status="interrupted")


def record_drop(run_dir: Path, reason: str) -> None:
    """Notes that a run which waited at its rung will not go on: its search is over."""
    from mgm_exp.record import explain, write_result

    result = read_record(run_dir / "result.json")
    if result.get("status") == "paused":
        write_result(run_dir, {**result, "status": "pruned", "error": explain(Pruned(reason))})


def record_failure(run_dir: Path, error: BaseException, overrides: Sequence[str], *, status: str = "failed") -> None:
    """Leaves the record of a run in the folder of a trial that did not get far enough to leave its own.

    Args:
        run_dir: The trial's folder.
        error: Why it did not start, or broke off.
        overrides: What it was to run with; the configuration itself may not exist.
        status: As ``result.json`` is to have it.
    """
    from mgm_exp.doctor import explained_error
    from mgm_exp.record import empty_result, explain, redact, write_manifest, write_result

    run_dir.mkdir(parents=True, exist_ok=True)
    run_id = f"{run_dir.parent.name}-{run_dir.name}-failed"
    now = datetime.now(UTC).isoformat(timespec="seconds")
    for name, content in (("config.yaml", "# This trial's configuration could not be used.\n"), ("metrics.jsonl", "")):
        if not (run_dir / name).exists():
            write_atomic(run_dir / name, content)
    lines = [str(error)] if isinstance(error, MgmError) else traceback.format_exception(error)
    with open(run_dir / "log.txt", "a", encoding="utf-8") as log:
        log.write("\n".join([f"--- {now} not started, or broke off", *redact(list(overrides)), *redact(lines)]) + "\n")
    manifest: dict[str, Any] = {
        "run_id": run_id,
        "config_hash": None,
        "command": list(overrides),
        **_environment(),
        "seed": None,
        "stages": [],
        "data": {"name": None, "fingerprint": None, "n_train": None},
        "model": {"name": None, "fingerprint": None, "n_parameters": None},
        "trainable": {"n_lora": 0, "n_other": 0, "n_total": 0, "patterns": []},
        "started_at": now,
        "ended_at": now,
    }
    if not (run_dir / "manifest.json").exists():
        write_manifest(run_dir, manifest)
    explained = explain(error)
    if status == "failed":
        explained = explained_error(explained, run_dir)
    write_result(run_dir, empty_result(run_id, status, explained))


@cache
def _environment() -> dict[str, Any]:
    from mgm_exp.record import collect_environment

    return collect_environment()
