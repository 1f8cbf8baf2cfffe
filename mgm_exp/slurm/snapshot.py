"""The code that queued jobs run from: a copy, named by its content. Editing the checkout changes no queued job."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mgm_exp.bootstrap import CONF, LAUNCHER, ROOT, SWEEPS

_PACKAGE = Path(__file__).resolve().parents[1]
_SKIPPED = ("__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache")


def snapshot(folder: Path) -> Path:
    """Copies the package, its presets and its plugins to ``folder/<hash>``, unless they are there already.

    The copy has the layout of a checkout, and remembers the state of git for the manifests of its runs.

    Returns:
        The copy: what ``PYTHONPATH`` is to begin with.
    """
    from mgm_exp.record import SOURCE, git_state

    files = dict(_files())
    origin: dict[str, Any] = {"git": git_state(ROOT)}
    digest = hashlib.sha256(json.dumps(origin, sort_keys=True).encode())
    for name in sorted(files):
        digest.update(f"\0{name}\0".encode())
        digest.update(files[name].read_bytes())
    target = folder / digest.hexdigest()[:16]
    if target.is_dir():
        return target
    beside = folder / f".{target.name}-{uuid.uuid4().hex[:8]}"
    try:
        for name, path in files.items():
            (beside / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, beside / name)
        (beside / SOURCE).write_text(json.dumps(origin), encoding="utf-8")
        os.rename(beside, target)
    except OSError:
        shutil.rmtree(beside, ignore_errors=True)
        if not target.is_dir():  # another command was quicker
            raise
    return target


def copy_presets(source: Path, folder: Path) -> Path:
    """Copies a folder of presets (``--config-dir``) to ``folder/<hash>``; gives the copy."""
    files = {str(path.relative_to(source)): path for path in sorted(source.rglob("*.y*ml")) if path.is_file()}
    digest = hashlib.sha256()
    for name, path in files.items():
        digest.update(f"\0{name}\0".encode() + path.read_bytes())
    target = folder / digest.hexdigest()[:16]
    for name, path in files.items():
        if not (target / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)
    target.mkdir(parents=True, exist_ok=True)
    return target


def _files() -> Iterator[tuple[str, Path]]:
    """Name in the copy -> file."""
    yield from _below(_PACKAGE, "mgm_exp")
    if ROOT != _PACKAGE:
        yield from _below(CONF, "conf")
        yield from _below(SWEEPS, "sweeps")
        yield from _below(LAUNCHER / "hydra_plugins", "launcher/hydra_plugins")
        return
    # An installed package: the presets lie in it, the plugins beside it.
    plugins = importlib.util.find_spec("hydra_plugins.mgm_exp_plugins")
    assert plugins is not None and plugins.origin is not None
    yield from _below(Path(plugins.origin).parent, "launcher/hydra_plugins/mgm_exp_plugins")


def _below(folder: Path, name: str) -> Iterator[tuple[str, Path]]:
    for where, folders, files in os.walk(folder):
        folders[:] = sorted(item for item in folders if item not in _SKIPPED)
        for file in sorted(files):
            path = Path(where) / file
            if not file.endswith(".pyc"):
                yield str(Path(name) / path.relative_to(folder)), path
