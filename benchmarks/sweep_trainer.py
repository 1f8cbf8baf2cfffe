"""Eight LoRA trials: one sweep of ours against what a user would do instead, a process of Trainer and PEFT for each.

Both sides do the same work; see :mod:`benchmarks.trials`. CPU time of whole process trees, start included. Two run at
a time, one on each of two cores, in an order in which ours and the Trainer's alternate. What the Trainer's took is kept
in ``peers/trainer.json``, for other benchmarks.
"""

from __future__ import annotations

import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.measurement import Row
from benchmarks.trials import BATCH, CACHED, NEAR, TRAINER, Bench, Sweep, apart, best, losses_of, prepared
from mgm_exp.store import write_json_atomic

BIT_EQUAL, TOLERANCE, OTHER_BATCHES = 2.1, 3.0, 4.0


def run(work: Path, quick: bool = False) -> list[Row]:
    """All rows, from one run of the Trainer's trials."""
    bench = prepared(work, quick)
    count = len(bench.points)
    trials = [bench.trial(number) for number in range(count)]
    sweeps = {
        "bit_equal": (CACHED,),
        "packed": (CACHED, "hydra/launcher=packed"),
        "grouped": (CACHED, "hydra/launcher=packed", "train.group_by=like_length"),
    }
    with ThreadPoolExecutor(2) as two:
        trainers, found = [], {}
        for number, trial in enumerate(trials):
            if number % 3 == 0 and sweeps:
                name = next(iter(sweeps))
                found[name] = two.submit(bench.sweep, name, *sweeps.pop(name))
            trainers.append(two.submit(bench.trainer, number, trial))
        fresh = two.submit(bench.fresh, count - 1)
        peers = [trainer.result() for trainer in trainers]
        ours, packed, grouped = (found[name].result() for name in ("bit_equal", "packed", "grouped"))
        alone = fresh.result()
    if not quick:
        write_json_atomic(TRAINER, {"trials": peers})
    return _rows(bench, peers, ours, packed, grouped, alone, quick)


def _is_bit_equal(trial: Path, fresh: Path) -> bool:
    """Losses, adapter and answers of a trial in a sweep and in a process of its own."""
    same_losses = losses_of(trial) == losses_of(fresh)
    files = ("adapter/adapter_model.safetensors", "predictions/custom.jsonl")
    said = [[(folder / name).read_bytes() for folder in (trial, fresh)] for name in files]
    predictions = [[json.loads(line)["prediction"] for line in text.decode().splitlines()] for text in said[1]]
    return same_losses and said[0][0] == said[0][1] and predictions[0] == predictions[1]


def _rows(
    bench: Bench,
    peers: list[dict[str, Any]],
    ours: Sweep,
    packed: Sweep,
    grouped: Sweep,
    alone: Path,
    quick: bool,
) -> list[Row]:
    theirs = sum(peer["cpu_s"] for peer in peers)
    losses, scores = [peer["losses"] for peer in peers], [peer["score"] for peer in peers]
    number = len(peers) - 1
    is_equal = _is_bit_equal(ours.folder / str(number), alone)
    loaded = sum(peer["loaded_s"] for peer in peers)
    step = statistics.median(second for peer in peers for second in peer["step_s"])
    how = (
        f"{len(peers)} trials of {bench.steps} steps of {BATCH} rows, {len(peers)} processes of Trainer and PEFT: "
        f"{loaded:.0f} s of them imports and loading, {step:.2f} s a step"
    )
    near = f"losses of all steps within {{:.1g}} of the Trainer's; winner: trial {{}}, the Trainer's {best(scores)}"

    def against(sweep: Sweep) -> str:
        found = apart(sweep.losses, losses)
        differ = found > NEAR or sweep.winner != best(scores)
        return near.format(found, sweep.winner) + (": they DIFFER" if differ else "")

    def row(what: str, sweep: Sweep, goal: float, exactness: str, more: str) -> Row:
        return Row(f"sweep8, {what}", "s", sweep.cpu_s, theirs, None if quick else goal, exactness, f"{how}; {more}")

    equal = f"trial {number} and the same run in a process of its own, nothing cached: "
    equal += "losses, adapter and answers bit-equal" if is_equal else "they DIFFER"
    apart_packed = apart(packed.losses, ours.losses)
    tolerance = f"losses within {apart_packed:.1g} of the bit-equal sweep's"
    tolerance += "" if apart_packed <= NEAR and packed.winner == ours.winner else ": they DIFFER"
    together = f"pack: {len(peers)} trial(s) train together"
    if any(together not in (sweep.folder / "0" / "pack.txt").read_text("utf-8") for sweep in (packed, grouped)):
        tolerance += "; NOT all of them trained together, so that the row is not what it says: they DIFFER"
    return [
        row("bit-equal", ours, BIT_EQUAL, f"{equal}; {against(ours)}", "one command, nothing in its store before"),
        row("tolerance", packed, TOLERANCE, f"{tolerance}; winner: trial {packed.winner}", "hydra/launcher=packed"),
        row(
            "other batches",
            grouped,
            OTHER_BATCHES,
            f"rows of like length are together: other batches, losses not compared; winner: trial {grouped.winner}",
            "hydra/launcher=packed train.group_by=like_length",
        ),
    ]
