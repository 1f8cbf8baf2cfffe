"""How much host memory a process uses together with all that it started."""

from __future__ import annotations

from pathlib import Path

# The resident memory that is the process's own: not the files that it has mapped, which the kernel can drop.
_OWN = ("RssAnon:", "RssShmem:")


def tree_gib(pid: int) -> float:
    """GiB of a process and its descendants; 0 where there is no /proc, or it has ended."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir() if Path("/proc/self").exists() else ():
        if entry.name.isdigit():
            parent = _parent(entry)
            if parent is not None:
                children.setdefault(parent, []).append(int(entry.name))
    total, pending = 0.0, [pid]
    while pending:
        current = pending.pop()
        total += own_gib(current)
        pending += children.get(current, [])
    return total


def _parent(entry: Path) -> int | None:
    try:
        return int((entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):  # it has ended
        return None


def own_gib(pid: int) -> float:
    """GiB of one process; 0 where there is no /proc, or it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith(_OWN)) / 2**20
