"""Eight LoRA trials by rungs, in full, and with Optuna's SuccessiveHalvingPruner: steps, processor time, the winner.

All three are the command that a user types (``python -m mgm_exp -m hydra/sweeper=mgm_optuna``), one after another in
processes of their own, on the same eight points (a grid) in the same order, each with a store of its own. In full no
trial is scored on its way; the other two score at the same validation points. CPU time of the process and its children,
start-up, shared stages, evaluation and report included.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measurement import Row

STEPS, EVERY = 64, 8
STEPS_QUICK, EVERY_QUICK = 4, 1
# Two scales and four rates, two of which do not learn in the steps there are.
GRID = ("adapter.rank=4,16", "train.lr=5e-5,1e-3,5e-3,2e-2")
TRIALS = 8
SEARCH = (
    "-m",
    "hydra/sweeper=mgm_optuna",
    "sweep.sampler.name=grid",
    f"sweep.n_trials={TRIALS}",
    *GRID,
    "adapter=lora_r8",
    "device=cpu",
    "eval.demo.split=val",
    "eval.demo.baselines=false",
    "tracker.mode=disabled",
)
PRUNERS = {
    "full": ("sweep.pruner.name=none",),
    "rungs": ("sweep.pruner.name=rungs", "sweep.pruner.reduction_factor=2"),
    "optuna": ("sweep.pruner.name=asha", "sweep.pruner.reduction_factor=2"),
}


@dataclass(frozen=True)
class Found:
    """What a sweep came to, and what it took."""

    cpu_s: float
    steps: int
    best: int
    params: dict[str, Any]
    value: float


def run(work: Path, quick: bool = False) -> list[Row]:
    """Measures all three."""
    steps, every = (STEPS_QUICK, EVERY_QUICK) if quick else (STEPS, EVERY)
    found = {name: _sweep(work / name, pruner, steps, every, quick) for name, pruner in PRUNERS.items()}
    ours, full, optuna = found["rungs"], found["full"], found["optuna"]
    return [
        _row("8 trials by rungs and in full", ours, full, steps, every),
        _row("8 trials by rungs and with Optuna's SuccessiveHalvingPruner", ours, optuna, steps, every),
    ]


def _row(name: str, ours: Found, peer: Found, steps: int, every: int) -> Row:
    same = ours.params == peer.params
    winner = "the same winner" if same else f"another winner: {ours.params} ({ours.value}), {peer.params}"
    bits = "with the same score" if ours.value == peer.value else f"scores {ours.value}, {peer.value}"
    return Row(
        name,
        "CPU s",
        ours.cpu_s,
        peer.cpu_s,
        None,
        f"{winner}, {bits}" if same else f"{winner} ({peer.value})",
        f"the demo's model, rank 4 and 16, four rates, {steps} steps, points every {every}; steps run: "
        f"{ours.steps} and {peer.steps} of {TRIALS * steps} (ratio {peer.steps / ours.steps:.2f})",
    )


def _sweep(root: Path, pruner: tuple[str, ...], steps: int, every: int, quick: bool) -> Found:
    points = () if "sweep.pruner.name=none" in pruner else (f"train.validation.every_steps={every}",)
    small = ("debug=fast",) if quick else ()
    command = [sys.executable, "-m", "mgm_exp", *small, *SEARCH, *pruner, *points, "train.validation.questions=64"]
    before = _children_s()
    subprocess.run(
        [*command, f"train.max_steps={steps}", f"paths.root={root}", "sweep.name=s"], check=True, env=_here()
    )
    spent = _children_s() - before
    record = json.loads((root / "sweeps" / "s" / "sweep.json").read_text(encoding="utf-8"))
    ran = 0
    for trial in record["trials"]:
        result = json.loads((root / "sweeps" / "s" / trial["run_dir"] / "result.json").read_text(encoding="utf-8"))
        ran += int(result["steps"])
    best = next(trial for trial in record["trials"] if trial["number"] == record["best"]["number"])
    return Found(spent, ran, best["number"], best["params"], record["best"]["value"])


def _here() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
