"""Where each process of a stage is in its work, and which of them the others wait for.

A process counts what it passes (:class:`Marks`: an addition, nothing more); a thread of it writes the count down every
few seconds, and where the main thread stands once the count stops growing. Whoever started the processes reads these
files: when nothing moves for too long, :class:`PulseWatch` names those that lag behind.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import mgm_exp

_PACKAGE = str(Path(mgm_exp.__file__).resolve().parent)
# From here on a process also writes down where it stands.
_STILL_S = 1.0
# A process that used this share of a core since its last beat is loading, not waiting.
_COMPUTES = 0.1
# Starting agents and processes on all machines may take this long, however short a step is.
BEGIN_S = 300.0


class Marks:
    """How far this process is.

    Attributes:
        step: The optimizer step that it works on, from 0.
        passed: Points of the work that it has passed; grows alike on all processes.
        worked: Other signs of work, which every process has its own number of.
        waits: Whether it is in an exchange of numbers with the others.
    """

    __slots__ = ("passed", "step", "waits", "worked")

    def __init__(self) -> None:
        self.step, self.passed, self.worked, self.waits = 0, 0, 0, False

    def tick(self) -> None:
        """One more point is passed."""
        self.passed += 1

    def works(self) -> None:
        """Something was done that not every process does equally often."""
        self.worked += 1


def beat_s(timeout_s: float) -> float:
    """How often a process says where it is."""
    return min(2.0, timeout_s / 8)


class Pulse(threading.Thread):
    """Writes down where this process is, until it ends.

    Args:
        path: The file.
        marks: Of this process.
        interval_s: Between two beats.
        stacks: When this file appears, the stacks of all threads are written to stderr, once.
    """

    def __init__(self, path: Path, marks: Marks, interval_s: float, stacks: Path) -> None:
        super().__init__(name="pulse", daemon=True)
        self._path, self._marks, self._interval_s, self._stacks = path, marks, interval_s, stacks
        self._ended = threading.Event()
        self._beat = 0

    def run(self) -> None:
        """The thread's work."""
        done, since, computed_s = (-1, -1), time.monotonic(), time.process_time()
        while True:
            marks, now = self._marks, time.monotonic()
            # Before the first exchange a process loads libraries and weights: that it computes is progress enough.
            if marks.passed == 0 and time.process_time() - computed_s > _COMPUTES * self._interval_s:
                computed_s = time.process_time()
                marks.works()
            if (marks.passed, marks.worked) != done:
                done, since = (marks.passed, marks.worked), now
            self._beat += 1
            row: dict[str, Any] = {
                "beat": self._beat,
                "step": marks.step,
                "passed": done[0],
                "worked": done[1],
                "waits": marks.waits,
            }
            if now - since >= min(_STILL_S, self._interval_s):
                row["where"] = _where(sys._current_frames().get(threading.main_thread().ident or 0))
            with contextlib.suppress(OSError):  # a network file system may be away for a while
                temporary = self._path.with_suffix(".tmp")
                temporary.write_text(json.dumps(row), encoding="utf-8")
                os.replace(temporary, self._path)
            if self._ended.wait(self._interval_s):
                return
            if self._stacks.exists():
                faulthandler.dump_traceback(all_threads=True)
                return

    def end(self) -> None:
        """No more beats."""
        self._ended.set()


def _where(frame: FrameType | None) -> str:
    """``step.py:78 take_step``: the innermost place in this package where a thread is."""
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(_PACKAGE):
            return f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}"
        frame = frame.f_back
    return ""


@dataclass
class _Seen:
    """What is known of one process, with the times at which it was seen to change."""

    row: dict[str, Any]
    beat_at: float
    moved_at: float


class PulseWatch:
    """Notices that nothing moves any more.

    Args:
        paths: Rank -> the file of its pulse.
        timeout_s: So long nothing may move.
        interval_s: Between two beats of a process.
        begin_s: So long it may take until all have begun.
    """

    def __init__(self, paths: dict[int, Path], timeout_s: float, interval_s: float, begin_s: float = BEGIN_S) -> None:
        self._begin_s = begin_s
        self._paths, self._timeout_s, self._interval_s = paths, timeout_s, interval_s
        self._seen: dict[int, _Seen] = {}
        self._moved_at = self._looked_at = time.monotonic()

    def heard(self) -> None:
        """Something was heard of the processes in another way."""
        self._moved_at = time.monotonic()

    def hang(self) -> Hang | None:
        """Who the others wait for, once nothing has moved for too long. Looks at the files when it is time to."""
        now = time.monotonic()
        if now - self._looked_at < self._interval_s / 2:
            return None
        self._looked_at = now
        for rank, path in self._paths.items():
            try:
                row = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            before = self._seen.get(rank)
            if before is None or any(before.row[key] != row[key] for key in ("passed", "worked")):
                self._seen[rank] = _Seen(row, now, now)
                self._moved_at = now
            elif before.row["beat"] != row["beat"]:
                before.row, before.beat_at = row, now
        have_begun = len(self._seen) == len(self._paths)
        limit_s = self._timeout_s if have_begun else max(self._timeout_s, self._begin_s)
        if now - self._moved_at < limit_s:
            return None
        silent_s = {rank: now - seen.beat_at for rank, seen in self._seen.items()}
        rows = {rank: seen.row for rank, seen in self._seen.items()}
        return laggards(rows, silent_s, len(self._paths), limit_s, 4 * self._interval_s)


@dataclass(frozen=True)
class Hang:
    """Nothing moves.

    Args:
        ranks: Those that the others wait for; all of them where nothing tells them apart.
        reason: What is known of them: ``does not answer ...``.
        step: At which optimizer step, from 1; None: before the first one.
    """

    ranks: tuple[int, ...]
    reason: str
    step: int | None


def laggards(
    rows: dict[int, dict[str, Any]], silent_s: dict[int, float], devices: int, timeout_s: float, silence_s: float
) -> Hang:
    """Which processes the others wait for.

    Args:
        rows: Rank -> its last pulse; a process that never began is not in it.
        silent_s: Rank -> seconds since its last beat.
        devices: Number of processes.
        timeout_s: So long nothing has moved.
        silence_s: A process that was silent for so long is stopped or gone.
    """
    step = max((int(row["step"]) + 1 for row in rows.values() if row["passed"]), default=None)
    missing = tuple(rank for rank in range(devices) if rank not in rows)
    if missing:
        return Hang(missing, f"has not begun after {timeout_s:g} s", step)
    silent = tuple(rank for rank in sorted(rows) if silent_s[rank] > silence_s)
    if silent and len(silent) < devices:
        longest = max(silent_s[rank] for rank in silent)
        return Hang(silent, f"does not answer (no sign of life for {longest:.0f} s: stopped, or its machine is)", step)
    least = min(int(row["passed"]) for row in rows.values())
    behind = tuple(rank for rank in sorted(rows) if int(rows[rank]["passed"]) == least)
    if len(behind) == devices:
        active = tuple(rank for rank in behind if not rows[rank]["waits"])
        behind = active or behind
    places = sorted({str(rows[rank].get("where") or "an unknown place") for rank in behind})
    return Hang(behind, f"lags behind (it is in {', '.join(places)})", step)
