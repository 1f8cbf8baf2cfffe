"""Where things lie in a store, and what their names say.

``<root>/<stage>/<key>/``
    published: what the stage made, its record ``stage.json``, its mark ``MANIFEST.json``
``<root>/<stage>/<key>.work/``
    being made: scratch and checkpoints; ``out/`` is what will be published
``<root>/<stage>/<key>.lease/``
    who makes it
``<root>/<stage>/<key>.damaged-1/``
    was published, did not verify, moved aside
``<root>/<stage>/<key>.trash-<id>/``
    being deleted
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from .files import PathLike

RECORD = "stage.json"
OUT = "out"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")
_OURS = re.compile(r"(?P<key>.+?)\.(?P<kind>work|lease|damaged|trash)(?:-(?P<number>[0-9a-f]+))?")


def is_name(name: str) -> bool:
    """Whether a stage or a key may be called so: it cannot lead elsewhere and is none of the store's own names."""
    return _NAME.fullmatch(name) is not None and _OURS.fullmatch(name) is None


def beside(final: Path, kind: str) -> Path:
    """The folder of a kind that belongs to an entry."""
    return final.with_name(f"{final.name}.{kind}")


def lease_of(work: PathLike) -> Path:
    """The lease folder that guards a work folder of the store: what a worker process hands to ``hold_shared``."""
    work = Path(work)
    match = _OURS.fullmatch(work.name)
    if match is None or match["kind"] != "work":
        raise ValueError(f"{work} is not a work folder of the store (<key>.work).")
    return work.with_name(f"{match['key']}.lease")


def work_number(work: Path) -> int:
    """3 for ``<key>.work-000003``, which a new owner has taken from one that may wake up; 0 for ``<key>.work``."""
    match = _OURS.fullmatch(work.name)
    return int(match["number"], 16) if match and match["number"] else 0


def stored_folders(root: Path) -> Iterator[tuple[str, str, str, Path]]:
    """(stage, key, kind, path) of everything in a store; the kind of what is published is ``entry``."""
    if not root.is_dir():
        return
    for stage in sorted(root.iterdir()):
        if not _NAME.fullmatch(stage.name) or stage.is_symlink() or not stage.is_dir():
            continue
        with os.scandir(stage) as listing:
            names = sorted(item.name for item in listing if item.is_dir(follow_symlinks=False))
        for name in names:
            match = _OURS.fullmatch(name)
            key, kind = (match["key"], match["kind"]) if match else (name, "entry")
            if _NAME.fullmatch(key):
                yield stage.name, key, kind, stage / name
