"""Whether a run's process stood still as a whole: then nobody sampled its machine either.

A loader or a file system that is slow holds up the steps, and ``system.jsonl`` goes on; a process that was stopped
(SIGSTOP, Ctrl-Z, a suspended job or machine) leaves a gap there that is longer than the rhythm of the samples.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median

from mgm_exp.doctor.curves import Row
from mgm_exp.doctor.facts import Fact
from mgm_exp.doctor.robust import is_finite

SYSTEM = "system.jsonl"
# Gaps of a stage from which on it has a rhythm; so many before and after a gap say what is usual there: the rhythm
# halves whenever a long run's file is thinned, and is full again when the run is resumed.
LEAST_GAPS, NEAR = 3, 8
# A sample comes so late at times where nothing stood still. A process that stands still now is left more: its samples
# may come over a network file system.
LATE_S, LATE_NOW_S = 6.0, 60.0


def standstill_facts(rows: Sequence[Row], held_at: float | None = None) -> dict[str, list[Fact]]:
    """``system.stood_still_s`` (the longest) and ``system.stood_still_share`` (of the sampled time) of each stage.

    Args:
        rows: Of ``system.jsonl``. Gaps are looked for within a stage only: a process begins with a sample of no stage,
            so that the pause between two attempts is none.
        held_at: When the run showed its last sign besides its samples, seconds since 1970, of a run at which a process
            is: then it may stand still now. None: none is.
    """
    gaps: dict[str, list[tuple[float, Row]]] = {}
    sampled = [row for row in rows if is_finite(row.values.get("t"))]
    for before, row in pairwise(sampled):
        stage = row.values.get("stage")
        if isinstance(stage, str) and before.values.get("stage") == stage:
            gaps.setdefault(stage, []).append((float(row.values["t"]) - float(before.values["t"]), row))
    found = {}
    for stage, known in gaps.items():
        if len(known) < LEAST_GAPS:
            continue
        lengths = [length for length, _ in known]
        stood = [(length - _usual(lengths, place), length, row, "") for place, (length, row) in enumerate(known)]
        if held_at is not None and sampled[-1] is known[-1][1]:
            since, usual = time.time() - float(sampled[-1].values["t"]), median(lengths[-NEAR:])
            if since - usual > LATE_NOW_S and held_at - float(sampled[-1].values["t"]) < LATE_NOW_S:
                stood.append((since - usual, since, sampled[-1], "up to now, "))
        late, length, row, until = max(stood, key=lambda one: one[0])
        told = f"{stage}: for {length:.0f} s, {until}nothing was sampled, else every {length - late:.3g} s"
        share = sum(one[0] for one in stood if one[0] > LATE_S) / max(sum(max(one[1], 0.0) for one in stood), 1e-9)
        place = f"{SYSTEM}:{row.line}"
        found[stage] = [
            Fact("system.stood_still_s", late, place, told),
            Fact("system.stood_still_share", share, place, f"{stage}: it stood still for {share:.0%} of the time"),
        ]
    return found


def last_sign(folder: Path) -> float:
    """When a run last wrote a row or a line, seconds since 1970; 0: never."""
    times = [0.0]
    for name in ("metrics.jsonl", "log.txt"):
        with contextlib.suppress(OSError):
            times.append((folder / name).stat().st_mtime)
    return max(times)


def _usual(lengths: Sequence[float], place: int) -> float:
    """The rhythm of the samples around a gap."""
    before, after = lengths[max(0, place - NEAR) : place], lengths[place + 1 : place + 1 + NEAR]
    return max(median(part) for part in (before, after) if part)
