"""What a sweeper costs when its sweep has 10,000 trials: one more trial, ``mgm-exp status``, and the report.

A search, and a grid, of n finished trials are laid out as they are on the disk: the study, ``sweep.json``, and a folder
for each trial with its configuration, manifest, result and predictions. Then the real campaign (the sampler, claims,
books) goes through a few more trials that do nothing, and the real ledger through a few cells; the seconds of processor
time that one more trial takes are counted, at few and at many trials.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measurement import Row

TRIALS, TRIALS_QUICK = 10_000, 60
FEW, FEW_QUICK = 100, 20
MORE, MORE_QUICK = 30, 4
QUESTIONS = 20


def run(work: Path, quick: bool = False) -> list[Row]:
    """Measures a sweep of few trials and one of many."""
    sizes = (FEW_QUICK, TRIALS_QUICK) if quick else (FEW, int(os.environ.get("SCALE_TRIALS", TRIALS)))
    more = MORE_QUICK if quick else MORE
    found = {size: measure(work / str(size), size, more) for size in sizes}
    few, many = found[sizes[0]], found[sizes[1]]
    print(json.dumps(found, indent=1), flush=True)
    what = {
        "trial": ("a trial of a search, everything but its run", "ms", 1000.0),
        "cell": ("a cell of a grid, everything but its run", "ms", 1000.0),
        "enrol": ("a grid finds its cells again", "s", 1.0),
        "start": ("a search is continued: from the command to its first trial", "s", 1.0),
        "status": ("mgm-exp status of one search", "s", 1.0),
        "report": ("mgm-exp report: tables", "s", 1.0),
    }
    return [
        Row(
            f"{text}, at {sizes[1]:,} trials and at {sizes[0]:,}",
            unit,
            factor * many[name],
            factor * few[name],
            None,
            "the same number of trials went through both",
            f"processor time of one process; sweep.json {many['mib']:.1f} MiB; {more} further trials",
        )
        for name, (text, unit, factor) in what.items()
    ]


def measure(root: Path, size: int, more: int) -> dict[str, float]:
    """Processor seconds of each; MiB of ``sweep.json``."""
    import optuna

    from mgm_exp.config import PrunerName
    from mgm_exp.status import show_status
    from mgm_exp.verbs.report import report
    from tests.search import campaign_scenario as scenario

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder = root / "sweeps" / "s"
    lay_out(folder, size)
    begun: list[float] = []

    def say(text: str) -> None:
        if text.startswith("\ntrial"):
            begun.append(time.process_time())

    before = time.process_time()
    content = scenario.search(folder, size + more, pruner=PrunerName.none, say=say)
    after = time.process_time()
    assert len(content["trials"]) == size + more, len(content["trials"])
    found = {
        "start": begun[0] - before,
        "trial": (begun[-1] - begun[0]) / (len(begun) - 1),
        "end": after - begun[-1],
        "mib": (folder / "sweep.json").stat().st_size / 2**20,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        found["status"] = _cpu(lambda: show_status("s", root))
        out = root / "report"
        out.mkdir()
        found["report"] = _cpu(lambda: report([folder], out / "comparison.json", out / "table.md"))
    found["enrol"], found["cell"] = grid(root / "sweeps" / "g", size, more)
    return found


def _cpu(call: Callable[[], Any]) -> float:
    before = time.process_time()
    call()
    return time.process_time() - before


def lay_out(folder: Path, size: int) -> None:
    """A search of finished trials: the study and the folders."""
    import optuna

    from mgm_exp.search import open_storage, storage_place
    from tests.search import campaign_scenario as scenario

    folder.mkdir(parents=True)
    study = optuna.create_study(
        storage=open_storage(storage_place(None, folder)), study_name=folder.name, direction="maximize"
    )
    space = {item.name: item.domain.distribution() for item in scenario.SPACE.dimensions}
    chance = random.Random(0)
    for number in range(size):
        params = {"adapter.rank": 8 if number == 0 else chance.randint(1, 64), "seed": 0 if number == 0 else 1}
        value = params["adapter.rank"] / 64
        study.add_trial(
            optuna.trial.create_trial(
                params=params,
                distributions=space,
                value=value,
                user_attrs={
                    "point": {
                        "overrides": [f"{key}={item}" for key, item in params.items()],
                        "params": params,
                        "config_hash": f"{number:016x}",
                    },
                    "verdict": "completed",
                    "reason": "",
                    "values": [value],
                    "violations": [0.0],
                },
            )
        )
        run_folder(folder / str(number), params, value, chance)


def run_folder(run_dir: Path, params: dict[str, Any], value: float, chance: random.Random) -> None:
    """What a run leaves behind, as far as the sweep and the report read it."""
    from tests.compare.run_folders import config, write_run

    settings = config(adapter__rank=params["adapter.rank"], seed=params["seed"], trial=int(run_dir.name))
    write_run(run_dir, [float(chance.random() < value) for _ in range(QUESTIONS)], settings=settings)


def grid(folder: Path, size: int, more: int) -> tuple[float, float]:
    """Processor seconds in which a grid's books find their cells, and of one cell that ends."""
    from mgm_exp.config import Direction
    from mgm_exp.grid import Cell
    from mgm_exp.ledger import Ledger
    from mgm_exp.store import write_json_atomic

    cells = []
    for number in range(size):
        run_dir = folder / str(number)
        run_dir.mkdir(parents=True)
        result = {"status": "completed", "metrics": {"demo/accuracy": number / size}, "wall_s": 1.0, "error": None}
        (run_dir / "result.json").write_text(json.dumps(result))
        params = {"adapter.rank": number, "seed": 0}
        cells.append((Cell(tuple(f"{key}={value}" for key, value in params.items()), params), f"{number:016x}"))
    rows = [
        {"number": number, "overrides": list(cell.overrides), "params": cell.params, "config_hash": key}
        for number, (cell, key) in enumerate(cells)
    ]
    write_json_atomic(folder / "sweep.json", {"trials": rows})
    before = time.process_time()
    ledger = Ledger(folder, "g", "demo/accuracy", Direction.maximize)
    trials = ledger.enrol(cells)
    ledger.write()
    enrolled = time.process_time()
    for trial in trials[:more]:
        ledger.note(trial)
    return enrolled - before, (time.process_time() - enrolled) / more


if __name__ == "__main__":  # DIR [--quick]
    for row in run(Path(sys.argv[1]), quick="--quick" in sys.argv):
        print(f"{row.name}: {row.ours:.1f} {row.unit}, {row.peer:.1f}")
