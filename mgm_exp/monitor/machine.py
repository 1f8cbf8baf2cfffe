"""One look at the machine: processors, memory, disks, network, and what the run's own processes take of them.

Read from ``/proc`` (Linux); what a system does not tell is left out of the sample. See :meth:`Machine.sample` for its
form, which is a line of ``system.jsonl``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mgm_exp.monitor.gpus import Gpus

PROC = Path("/proc")
GIB, MIB = 2**30, 2**20
# Resident memory that is a process's own: not the files that it has mapped, which the kernel can drop.
_OWN = ("RssAnon:", "RssShmem:")


class Machine:
    """What a run sees of its machine. Rates are means since the sample before.

    Args:
        disks: Folders whose disks are watched, by the name that they get.
        gpus: The run's GPUs; None: it has none.
        pid: The process whose tree is the run's; None: this one.
    """

    def __init__(self, disks: Mapping[str, Path], gpus: Gpus | None = None, pid: int | None = None) -> None:
        self._disks, self._gpus, self._pid = dict(disks), gpus, pid or os.getpid()
        self._before: dict[str, Any] = {}
        self._tick = os.sysconf("SC_CLK_TCK")
        self._has_children_files = (PROC / "self" / "task" / str(os.getpid()) / "children").exists()

    def sample(self, now: float) -> dict[str, Any]:
        """One look.

        Args:
            now: Seconds since 1970.

        Returns:
            ``t, cpu`` (share of all processors, 0..1), ``memory_gib, memory_total_gib, process_memory_gib,
            process_cpu`` (processors in use), ``disks{name: {free_gib, total_gib}}, network{received_mib_s,
            sent_mib_s}, gpus[...]`` (:meth:`Gpus.sample`). Rates come with the second sample.
        """
        sample: dict[str, Any] = {"t": round(now, 2)}
        elapsed = now - self._before.get("t", now)
        self._before["t"] = now
        sample |= self._processors() | _memory() | self._processes(elapsed)
        sample["disks"] = {name: room for name, path in self._disks.items() if (room := _room(path))}
        if network := self._network(elapsed):
            sample["network"] = network
        if self._gpus is not None:
            sample["gpus"] = self._gpus.sample()
        return sample

    def _processors(self) -> dict[str, float]:
        try:
            fields = [int(n) for n in (PROC / "stat").read_text().split("\n", 1)[0].split()[1:9]]
        except (OSError, ValueError):
            return {}
        total, idle = sum(fields), fields[3] + fields[4]
        before, self._before["cpu"] = self._before.get("cpu"), (total, idle)
        if before is None or total == before[0]:
            return {}
        return {"cpu": round(1 - (idle - before[1]) / (total - before[0]), 4)}

    def _processes(self, elapsed: float) -> dict[str, float]:
        """Memory of the run's processes, and processors that they kept busy."""
        memory, busy = 0, {}
        for pid in self._tree():
            try:
                lines = (PROC / str(pid) / "status").read_text(errors="replace").splitlines()
                fields = (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            memory += sum(int(line.split()[1]) for line in lines if line.startswith(_OWN))
            busy[pid] = int(fields[11]) + int(fields[12])
        before, self._before["busy"] = self._before.get("busy"), busy
        found = {"process_memory_gib": round(memory / MIB, 4)} if busy else {}
        if before is not None and elapsed > 0:
            used = sum(ticks - before.get(pid, 0) for pid, ticks in busy.items())
            found["process_cpu"] = round(max(used, 0) / self._tick / elapsed, 3)
        return found

    def _tree(self) -> Iterator[int]:
        pending = [self._pid]
        everyone = None if self._has_children_files else _children_of_all()
        while pending:
            pid = pending.pop()
            yield pid
            pending += _children(pid) if everyone is None else everyone.get(pid, [])

    def _network(self, elapsed: float) -> dict[str, float]:
        try:
            lines = (PROC / "net" / "dev").read_text().splitlines()[2:]
        except OSError:
            return {}
        received = sent = 0
        for line in lines:
            name, _, numbers = line.partition(":")
            if name.strip() != "lo":
                fields = numbers.split()
                received, sent = received + int(fields[0]), sent + int(fields[8])
        before, self._before["network"] = self._before.get("network"), (received, sent)
        if before is None or elapsed <= 0:
            return {}
        # A device that went away takes its count with it.
        rates = [max(0, new - old) / elapsed / MIB for new, old in zip((received, sent), before, strict=True)]
        return {"received_mib_s": round(rates[0], 3), "sent_mib_s": round(rates[1], 3)}


def _memory() -> dict[str, float]:
    try:
        lines = dict(line.split(":", 1) for line in (PROC / "meminfo").read_text().splitlines())
        total, free = (int(lines[key].split()[0]) for key in ("MemTotal", "MemAvailable"))
    except (OSError, ValueError, KeyError):
        return {}
    return {"memory_gib": round((total - free) / MIB, 3), "memory_total_gib": round(total / MIB, 3)}


def _room(path: Path) -> dict[str, float] | None:
    """What is free for this user on the disk of a folder, or of what will hold it."""
    for place in (path, *path.parents):
        try:
            facts = os.statvfs(place)
        except OSError:
            continue
        total = (facts.f_blocks - facts.f_bfree + facts.f_bavail) * facts.f_frsize
        return {"free_gib": round(facts.f_bavail * facts.f_frsize / GIB, 3), "total_gib": round(total / GIB, 3)}
    return None


def _children(pid: int) -> list[int]:
    found: list[int] = []
    try:
        for task in os.listdir(PROC / str(pid) / "task"):
            found += map(int, (PROC / str(pid) / "task" / task / "children").read_text().split())
    except OSError:  # a thread or the process has ended
        pass
    return found


def _children_of_all() -> dict[int, list[int]]:
    """For kernels without ``children`` files: every process is asked for its parent."""
    found: dict[int, list[int]] = {}
    for name in os.listdir(PROC) if PROC.is_dir() else ():
        if name.isdigit():
            try:
                parent = int((PROC / name / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
            except OSError:
                continue
            found.setdefault(parent, []).append(int(name))
    return found
