"""A step of our loop against the Trainer's, and the memory that both take above the loaded process.

The same trial on both sides; see :mod:`benchmarks.trials`. For the loop both compute the loss at supervised positions
and encode their images in every step, so that nothing but the loop differs; for memory each is as it is. The two run
beside each other, a core each: what else the machine does, it does to both.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.measurement import Row
from benchmarks.prototype import VOCABULARY, write_model
from benchmarks.trials import apart, near, prepared

REPEATS, REPEATS_QUICK = 2, 1
LOOP, MEMORY = 1 / 1.03, 1 / 0.6
CHUNKED = "train.loss_chunk=16"
# Loops of one's own that the same trial is run in, too. (DeepSpeed's stage 2 would compute in bf16, which takes a
# processor without such instructions twenty times as long.)
LOOPS = ("accelerate", "deepspeed")
# Words of MGM-2B's vocabulary for each unit of its width, which is what logits cost beside activations.
WORDS_A_UNIT = 125


def run(work: Path, quick: bool = False) -> list[Row]:
    """Both rows."""
    bench = prepared(work, quick, taught=0)  # nothing is asked
    curated = bench.curated()
    same: dict[str, Any] = {"label_head": True}
    trial = bench.trial(0)
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    for _ in range(REPEATS_QUICK if quick else REPEATS):
        with ThreadPoolExecutor(1) as other_core:
            other = other_core.submit(bench.trainer, 0, trial, **same)
            ours.append(bench.stage("stage", curated))
            theirs.append(other.result())

    wide = bench.work / "wide"
    wide.mkdir()
    write_model(wide, WORDS_A_UNIT * 256)
    with ThreadPoolExecutor(2) as two:
        stage = two.submit(bench.stage, "wide_stage", curated, f"model.path={wide}", CHUNKED)
        trainer = two.submit(bench.trainer, 0, trial, model=str(wide))
        loops = {engine: two.submit(bench.own_loop, engine, trial, **same) for engine in LOOPS}
        lean, full = stage.result(), trainer.result()
        others = {engine: loop.result() for engine, loop in loops.items()}
    same_losses = [theirs[0], others["accelerate"], others["deepspeed"]]
    far = apart([ours[0]["losses"]] * len(same_losses), [found["losses"] for found in same_losses])
    exactness = f"the same work: {near(far)}"
    ratios = [paired(mine, other) for mine, other in zip(ours, theirs, strict=True)]
    ratio = statistics.median(ratios)
    step = statistics.median(ours[0]["step_s"])
    beside = ", ".join(f"{name} {paired(ours[0], found):.2f}" for name, found in others.items())
    return [
        Row(
            "a step of the loop, and the Trainer's",
            "s",
            step,
            step * ratio,
            None if quick else LOOP,
            exactness,
            f"images decoded and encoded in each step, the loss at supervised positions on both sides; ratio of the "
            f"same step's CPU time, median over steps, of {len(ratios)} repeats, the two beside each other "
            f"({', '.join(f'{value:.2f}' for value in ratios)}); against ours: {beside}",
        ),
        Row(
            "memory above the loaded process, and the Trainer's",
            "MiB",
            lean["above_mib"],
            full["above_mib"],
            None if quick else MEMORY,
            near(apart([lean["losses"]], [full["losses"]])),
            "highest resident memory while training less what is resident once all is loaded, with "
            f"{WORDS_A_UNIT * 256:,} words: as many for the width as MGM-2B has; {CHUNKED}. With {VOCABULARY:,} words, "
            f"without it, {ours[0]['above_mib']:.0f} MiB, the Trainer with our loss {theirs[0]['above_mib']:.0f} MiB",
        ),
    ]


def paired(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    """Median over the steps of how many times longer the other side takes for the same step; the first is left out."""
    pairs = zip(ours["step_s"][1:], theirs["step_s"][1:], strict=True)
    return statistics.median(other / mine for mine, other in pairs)
