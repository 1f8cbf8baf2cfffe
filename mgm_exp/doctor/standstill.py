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
# Gaps from which on there is a rhythm; so many before and after a gap, in whatever stage, say what is usual there: the
# rhythm halves whenever a long run's file is thinned, and is full again when the run is resumed.
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
    sampled = [row for row in rows if is_finite(row.values.get("t"))]
    lengths = [float(row.values["t"]) - float(before.values["t"]) for before, row in pairwise(sampled)]
    if len(lengths) < LEAST_GAPS:
        return {}
    gaps: dict[str, list[tuple[float, float, Row, str]]] = {}
    for place, (before, row) in enumerate(pairwise(sampled)):
        stage = row.values.get("stage")
        if isinstance(stage, str) and before.values.get("stage") == stage:
            gaps.setdefault(stage, []).append((lengths[place] - _usual(lengths, place), lengths[place], row, ""))
    last, stage = sampled[-1], sampled[-1].values.get("stage")
    if held_at is not None and isinstance(stage, str):
        since, usual = time.time() - float(last.values["t"]), median(lengths[-NEAR:])
        if since - usual > LATE_NOW_S and held_at - float(last.values["t"]) < LATE_NOW_S:
            gaps.setdefault(stage, []).append((since - usual, since, last, ", up to now,"))
    found = {}
    for stage, stood in gaps.items():
        late, length, row, until = max(stood, key=lambda one: one[0])
        told = f"{stage}: for {length:.0f} s{until} nothing was sampled, else every {length - late:.3g} s"
        share = sum(one[0] for one in stood if one[0] > LATE_S) / max(sum(max(one[1], 0.0) for one in stood), 1e-9)
        line = f"{SYSTEM}:{row.line}"
        found[stage] = [
            Fact("system.stood_still_s", late, line, told),
            Fact("system.stood_still_share", share, line, f"{stage}: it stood still for {share:.0%} of the time"),
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
