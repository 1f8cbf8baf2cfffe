"""What a run ran on: code, packages, machine. For reading later, never for choosing what to do."""

from __future__ import annotations

import csv
import functools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from mgm_exp.record.secrets import redact_text

# A larger diff is cut: it is there to tell what was changed, not to be a backup.
DIFF_LIMIT = 200_000
# In a copy of the code: what git said of the checkout that it was made from.
SOURCE = "source.json"
_TIMEOUT_S = 10.0


def collect_environment() -> dict[str, Any]:
    """``{git{commit,dirty,diff}, packages, python, platform, device}`` of this process, without secrets.

    ``device`` holds ``type`` (cuda or cpu), ``name``, ``count``, ``memory_gib`` of one, ``driver``, ``cuda``, ``cpu``,
    ``cpu_count``, ``cpu_capability`` (the vector instructions torch uses) and ``threads``. GPUs are read through the
    driver's own tool, so that this process takes no memory on them.
    """
    return {
        "git": dict(_own_git()),
        "packages": dict(_packages()),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "device": this_device(),
    }


@functools.cache
def _own_git() -> dict[str, Any]:
    """Looked up once a process: what runs is the code that was loaded, whatever is changed meanwhile."""
    return git_state(Path(__file__).resolve().parents[2])


def git_state(root: Path) -> dict[str, Any]:
    """``{commit, dirty, diff}`` of the checkout that code lies in, or was copied from; nulls where there is none."""
    nothing = {"commit": None, "dirty": None, "diff": None}
    if (root / SOURCE).is_file():
        return dict(json.loads((root / SOURCE).read_text(encoding="utf-8"))["git"])
    if not (root / ".git").exists():
        return nothing
    commit = _run(["git", "rev-parse", "HEAD"], root)
    status = _run(["git", "status", "--porcelain"], root)
    if commit is None or status is None:
        return nothing
    diff = redact_text(_run(["git", "diff", "HEAD"], root) or "") if status else ""
    if len(diff) > DIFF_LIMIT:
        diff = f"{diff[:DIFF_LIMIT]}\n... cut: {len(diff):,} characters in all\n"
    return {"commit": commit.strip(), "dirty": bool(status.strip()), "diff": diff}


def files_changed(commit: str) -> list[str] | None:
    """Files of the package and its configuration that differ from a commit, in this checkout.

    Args:
        commit: As a manifest has it, which may be anybody's: what is no hexadecimal digest is asked of nobody.

    Returns:
        Paths; None where this is no checkout, or it does not know the commit.
    """
    root = Path(__file__).resolve().parents[2]
    if not re.fullmatch(r"[0-9a-f]{40,64}", commit) or not (root / ".git").exists():
        return None
    listing = _run(["git", "diff", "--name-only", commit, "--", "mgm_exp", "conf", "sweeps", "launcher"], root)
    return None if listing is None else listing.splitlines()


@functools.cache
def _packages() -> dict[str, str]:
    told = (distribution.metadata for distribution in metadata.distributions())  # each is read anew where it is asked
    found = {one["Name"]: one["Version"] for one in told if one["Name"]}
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def this_device() -> dict[str, Any]:
    """The GPU, or the CPU where there is none: ``type, name, count, memory_gib, driver, cuda, cpu, cpu_count, ...``."""
    import torch

    device: dict[str, Any] = {
        "type": "cpu",
        "name": _cpu_name(),
        "count": 1,
        "memory_gib": _memory_gib(),
        "driver": None,
        "cuda": torch.version.cuda,
        "cpu": _cpu_name(),
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    gpus = _gpus()
    if gpus and torch.version.cuda is not None:
        name, memory_mib, driver = gpus[0]
        memory = float(memory_mib) / 1024
        device.update(type="cuda", name=name, count=len(gpus), memory_gib=round(memory, 2), driver=driver)
    return device


def _gpus() -> list[list[str]]:
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    listing = _run(query, Path.cwd()) or ""
    rows = [[cell.strip() for cell in row] for row in csv.reader(listing.splitlines())]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        rows = rows[: len([entry for entry in visible.split(",") if entry.strip() not in ("", "-1")])]
    return [row for row in rows if len(row) == 3 and row[1].replace(".", "", 1).isdigit()]


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        return platform.processor() or platform.machine()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 2)
    except (OSError, ValueError):
        return None


def _run(command: list[str], folder: Path) -> str | None:
    """The output of a small command, or None where it fails or takes too long."""
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "replace")
