"""How much of a sweep could be saved at all: eight LoRA trials in one process with nothing around them.

The peers of :mod:`benchmarks.sweep_trainer` and its model and data; :mod:`benchmarks.peers.floor` is the least that the
same trials take on this machine, whoever runs them. Two of the Trainer's trials are measured beside it, and count for
all: they differ in rank alone. What a goal asks beyond these rows is not to be had against this peer.
"""

from __future__ import annotations

import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.measurement import Row
from benchmarks.trials import BATCH, apart, near, prepared

# Name, rows by length, rungs.
VARIANTS = (
    ("all steps", False, ()),
    ("all steps, rows of like length together", True, ()),
    ("rungs at 2, 4 and 8", False, (2, 4, 8)),
)
MEASURED = 2
PARTS = (("imports and loading", "loaded_s"), ("images", "seen_s"), ("steps", "step_s"), ("questions", "asked_s"))


def run(work: Path, quick: bool = False) -> list[Row]:
    """A row for each variant."""
    bench = prepared(work, quick)
    count = len(bench.points)
    trials = [bench.trial(number) for number in range(count)]
    with ThreadPoolExecutor(1) as beside:
        floors_beside = beside.submit(
            lambda: [
                bench.floor(f"floor_{place}", trials, by_length, [step for step in rungs if step < bench.steps])
                for place, (_, by_length, rungs) in enumerate(VARIANTS)
            ]
        )
        peers = [bench.trainer(number) for number in range(MEASURED)]
        floors = floors_beside.result()
    theirs = count * statistics.mean(peer["cpu_s"] for peer in peers)
    rows = []
    for (what, by_length, _), found in zip(VARIANTS, floors, strict=True):
        begun = [peer["losses"][: len(mine)] for peer, mine in zip(peers, found["losses"], strict=False)]
        far = apart(found["losses"][:MEASURED], begun)
        same = "other batches: losses not compared" if by_length else f"{near(far)} of the Trainer's"
        parts = ", ".join(f"{part} {found[key]:.1f} s" for part, key in PARTS)
        rows.append(
            Row(
                f"the floor of sweep8, {what}, and the Trainer's processes",
                "s",
                found["cpu_s"],
                theirs,
                None,
                same,
                f"{count} trials, {sum(map(len, found['losses']))} steps of {BATCH} rows in one bare process: {parts}; "
                f"{MEASURED} of the Trainer's trials beside it, times {count / MEASURED:.0f}",
            )
        )
    return rows
