"""How much of a sweep could be saved at all: eight LoRA trials in one process with nothing around them.

The peers of :mod:`benchmarks.sweep_trainer` and its model and data; :mod:`benchmarks.peers.floor` is the least that the
same trials take on this machine, whoever runs them. One of the Trainer's trials runs beside each, and counts for all:
they differ in rank alone. What a goal asks beyond these rows is not to be had against this peer.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.measurement import Row
from benchmarks.trials import BATCH, apart, near, prepared

# Name, rungs.
VARIANTS = (("all steps", ()), ("rungs at 2, 4 and 8", (2, 4, 8)))
PARTS = (("imports and loading", "loaded_s"), ("images", "seen_s"), ("steps", "step_s"), ("questions", "asked_s"))


def run(work: Path, quick: bool = False) -> list[Row]:
    """A row for each variant."""
    bench = prepared(work, quick)
    count = len(bench.points)
    trials = [bench.trial(number) for number in range(count)]
    rows = []
    for place, (what, rungs) in enumerate(VARIANTS):
        reached = [step for step in rungs if step < bench.steps]
        with ThreadPoolExecutor(1) as beside:
            floor = beside.submit(bench.floor, f"floor_{place}", trials, reached)
            peer = bench.trainer(place, trials[place])
            found = floor.result()
        mine = found["losses"][place]
        far = apart([mine], [peer["losses"][: len(mine)]])
        parts = ", ".join(f"{part} {found[key]:.1f} s" for part, key in PARTS)
        rows.append(
            Row(
                f"the floor of sweep8, {what}, and the Trainer's processes",
                "s",
                found["cpu_s"],
                count * peer["cpu_s"],
                None,
                f"{near(far)} of the Trainer's",
                f"{count} trials, {sum(map(len, found['losses']))} steps of {BATCH} rows in one bare process: {parts}; "
                f"one of the Trainer's trials beside it, times {count}",
            )
        )
    return rows
