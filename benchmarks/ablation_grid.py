"""The ablation of two data arms and three adapters as one grid, against six runs that share nothing.

An eighth of the demo: pictures, steps and questions, so that both sides do in a minute or two what they do in ten. A
run curates (and captions, in one arm), aligns, encodes the images, trains and answers; a grid curates and aligns once
for each arm. CPU time of process trees, two beside each other, one on each of two cores.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.measurement import Row
from benchmarks.trials import cpu_of, losses_of

GOAL = 2.0
DATA, ADAPTERS = ("raw", "blip2"), ("full", "lora_r8", "lora_r16")
SMALL = (
    "data.demo_images=250",
    "data.demo_questions=72",
    "train.align.max_steps=10",
    "train.max_steps=8",
    "data.recipe.engine=builtin",
    "eval.demo.baselines=false",
    "tracker=disabled",
    "device=cpu",
)
TINY = (
    *SMALL,
    "data.demo_images=64",
    "data.demo_questions=12",
    "train.align.max_steps=1",
    "train.max_steps=1",
)


def run(work: Path, quick: bool = False) -> list[Row]:
    """One row."""
    adapters = ADAPTERS[:1] if quick else ADAPTERS
    settings = TINY if quick else SMALL
    cells = [(data, adapter) for data in DATA for adapter in adapters]

    def alone(data: str, adapter: str) -> tuple[float, Path]:
        root = work / f"{data}-{adapter}"
        command = [sys.executable, "-m", "mgm_exp", f"data={data}", f"adapter={adapter}", *settings]
        seconds = cpu_of([*command, f"paths.root={root}", "name=alone"], work / f"{data}-{adapter}.log")
        return seconds, next((root / "runs" / "alone").iterdir())

    def grid() -> float:
        command = [sys.executable, "-m", "mgm_exp", "-m", f"data={','.join(DATA)}", f"adapter={','.join(adapters)}"]
        return cpu_of([*command, *settings, f"paths.root={work / 'grid'}", "sweep.name=s"], work / "grid.log")

    with ThreadPoolExecutor(2) as two:
        ours = two.submit(grid)
        runs = [two.submit(alone, *cell) for cell in cells]
        seconds, theirs = ours.result(), [run.result() for run in runs]
    sweep = work / "grid" / "sweeps" / "s"
    trials = json.loads((sweep / "sweep.json").read_text(encoding="utf-8"))["trials"]
    found = {_cell(trial): sweep / trial["run_dir"] for trial in trials}
    equal = [_same(found[cell], folder) for cell, (_, folder) in zip(cells, theirs, strict=True)]
    said = f"losses and answers of {sum(equal)} of {len(cells)} runs are bit-equal"
    return [
        Row(
            f"ablation grid of {len(DATA)} x {len(adapters)}, and {len(cells)} runs that share nothing",
            "s",
            seconds,
            sum(cpu_s for cpu_s, _ in theirs),
            None if quick else GOAL,
            said if all(equal) else f"{said}: they DIFFER",
            f"an eighth of the demo ({', '.join(settings[:4])}); one command, and {len(cells)} commands of "
            f"{', '.join(f'{cpu_s:.0f}' for cpu_s, _ in theirs)} s",
        )
    ]


def _cell(trial: Mapping[str, Any]) -> tuple[str, str]:
    given = dict(item.split("=", 1) for item in trial["overrides"])
    return given["data"], given["adapter"]


def _same(ours: Path, theirs: Path) -> bool:
    """Losses of the instruct stage, and all answers."""
    said = []
    for folder in (ours, theirs):
        lines = (folder / "predictions" / "demo.jsonl").read_text(encoding="utf-8").splitlines()
        said.append([(row["question_id"], row["prediction"]) for row in map(json.loads, lines)])
    return losses_of(ours) == losses_of(theirs) and said[0] == said[1]
