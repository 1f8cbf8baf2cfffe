"""A whole search in a few dozen milliseconds: the real campaign, study, claims, reports and books, and trials that only
write what a trial writes. For tests that kill it at every system call.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mgm_exp.campaign import Campaign
from mgm_exp.config import (
    BudgetConfig,
    Direction,
    ExperimentConfig,
    PlateauConfig,
    PrunerConfig,
    PrunerName,
    SamplerConfig,
    SweepConfig,
)
from mgm_exp.record import empty_result
from mgm_exp.search.outcome import Ending
from mgm_exp.search.pruners import make_pruner
from mgm_exp.search.reports import reporter_for, study_name
from mgm_exp.search.samplers import make_sampler
from mgm_exp.search.space import Choice, Dimension, Numbers, Space
from mgm_exp.search.study import open_storage, open_study, storage_place
from mgm_exp.slots import Slots, Work
from mgm_exp.store import Lease, write_atomic, write_json_atomic
from mgm_exp.study_books import StudyBooks
from tests.test_stages import base

SPACE = Space(
    (),
    (
        Dimension("adapter.rank", "adapter.rank", Numbers(1, 64, None, True, True)),
        Dimension("seed", "seed", Choice((0, 1, 2), ("0", "1", "2"))),
    ),
)
POINTS = 2


def config_of(settings: SweepConfig, overrides: Sequence[str]) -> ExperimentConfig:
    values = dict(item.split("=", 1) for item in overrides)
    config = base()
    adapter = replace(config.adapter, rank=int(values.get("adapter.rank", 8)))
    validation = replace(config.train.validation, every_steps=1)
    trial = int(values["trial"]) if "trial" in values else None
    if "sweep.pause_after" in values:
        settings = replace(settings, pause_after=int(values["sweep.pause_after"]))
    return replace(
        config,
        adapter=adapter,
        seed=int(values.get("seed", 0)),
        sweep=settings,
        trial=trial,
        train=replace(config.train, validation=validation),
    )


class Direct(Slots):
    """One slot; a trial notes that it began, reports, and leaves its result. ``size`` trials begin before one ends."""

    def __init__(self, settings: SweepConfig, step_s: float, points: int = POINTS, size: int = 1) -> None:
        self.settings, self.step_s, self.points, self.size = settings, step_s, points, size
        self.done: list[tuple[Work, Ending]] = []
        self.failing: Sequence[int] = ()

    @property
    def busy(self) -> int:
        return len(self.done)

    def start(self, work: Work) -> None:
        work.run_dir.mkdir(parents=True, exist_ok=True)
        lease = Lease(work.run_dir / ".lease")
        lease.acquire(wait=False)
        try:
            self._run(work)
        finally:
            lease.release()
        self.done.append((work, Ending()))

    def _run(self, work: Work) -> None:
        config = config_of(self.settings, work.overrides)
        with open(work.run_dir / "calls.txt", "a", encoding="utf-8") as calls:
            calls.write(" ".join(work.overrides) + "\n")
        write_atomic(work.run_dir / "config.yaml", "{}\n")
        reporter, value = reporter_for(config, work.run_dir), config.adapter.rank / 64
        checkpoint = work.run_dir / "checkpoint.txt"
        done, stopped = int(checkpoint.read_text()) if checkpoint.exists() else 0, reporter.was_stopped
        for step in range(done + 1, self.points + 1):
            if reporter.is_paused:
                break
            time.sleep(self.step_s)
            while step == self.points and is_held(work.run_dir):
                time.sleep(0.02)
            with open(work.run_dir / "steps.txt", "a", encoding="utf-8") as steps:
                steps.write(f"{step}\n")
            if step < self.points or config.sweep.pause_after is None:  # the last rung is the trial's end
                stopped = reporter.report(step, value * step / self.points) or stopped
            write_atomic(checkpoint, str(step))
            done = step
        status = "completed"
        if done < self.points or stopped:
            status = "paused" if reporter.is_paused else "pruned"
        elif config.adapter.rank in self.failing:
            status = "failed"
        metrics = {} if status != "completed" else {"demo/accuracy": value}
        error = {"type": "X", "message": "told to", "cause": "", "advice": ""} if status == "failed" else None
        facts = {"steps": done, "planned_steps": self.points, "wall_s": 0.1, "error": error}
        result = {**empty_result(work.run_dir.name, status), "metrics": metrics, **facts}
        write_json_atomic(work.run_dir / "result.json", result)

    def ended(self, timeout_s: float) -> list[tuple[Work, Ending]]:
        done, self.done = self.done, []
        return done

    def stop(self) -> list[tuple[Work, Ending]]:
        return self.ended(0)


def hold_file(folder: Path) -> Path:
    """While it is there, trials from the number in it on do not come to their end."""
    return folder.with_name(f"{folder.name}.hold")


def is_held(run_dir: Path) -> bool:
    run_dir = run_dir.parent if run_dir.name.startswith("seed_") else run_dir
    try:
        return int(run_dir.name) >= int(hold_file(run_dir.parent).read_text())
    except FileNotFoundError:
        return False


def search(
    folder: Path,
    n_trials: int,
    storage: str | None = None,
    *,
    step_s: float = 0.0,
    pruner: PrunerName = PrunerName.median,
    plateau: int | None = None,
    say: Any = None,
    enqueue: Sequence[dict[str, Any]] = ({"adapter.rank": 8, "seed": 0},),
    points: int = POINTS,
    factor: int = 2,
    synchronous: bool = True,
    slots: int = 1,
    seeds: int = 1,
    failing: Sequence[int] = (),
    budget: BudgetConfig | None = None,
) -> dict[str, Any]:
    """One call of the command: continues what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = SweepConfig(
        name="s",
        n_trials=n_trials,
        storage=storage,
        enqueue=list(enqueue),
        sampler=SamplerConfig(startup=2),
        pruner=PrunerConfig(pruner, startup=1, reduction_factor=factor, synchronous=synchronous),
        seeds=seeds,
        budget=budget or BudgetConfig(),
        plateau=PlateauConfig(plateau),
    )
    with Lease(folder / ".desk"):
        study = open_study(
            open_storage(storage_place(storage, folder)),
            study_name(folder),
            [Direction.maximize],
            make_sampler(settings.sampler, SPACE, with_constraints=True),
            make_pruner(settings.pruner, 1),
        )
    books = StudyBooks(folder, "s", ["demo/accuracy"], [Direction.maximize], study)
    places = Direct(settings, step_s, points, slots)
    places.failing = failing
    campaign = Campaign(
        study,
        SPACE,
        books,
        config_of(settings, ()),
        places,
        lambda name, overrides: None,
        lambda overrides: config_of(settings, overrides),
        say or (lambda text: None),
    )
    return campaign.run()


def summary(content: dict[str, Any]) -> list[tuple[int, str, Any, Any]]:
    """What must be the same whatever happened on the way."""
    return [(t["number"], t["status"], t["params"], t["values"]) for t in content["trials"]]


def calls(folder: Path, number: int) -> int:
    file = folder / str(number) / "calls.txt"
    return len(file.read_text(encoding="utf-8").splitlines()) if file.exists() else 0


if __name__ == "__main__":  # a sweeper of its own, to be killed: FOLDER TRIALS STORAGE SECONDS_A_STEP
    place = None if sys.argv[3] == "journal" else sys.argv[3]
    search(
        Path(sys.argv[1]),
        int(sys.argv[2]),
        place,
        step_s=float(sys.argv[4]),
        pruner=PrunerName.none,
        say=lambda text: print(text, flush=True),
    )
