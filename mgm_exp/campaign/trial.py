"""A trial that this sweeper works on: its point, its claim, the seeds that are still to run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mgm_exp.config import ExperimentConfig
from mgm_exp.repeats import subfolder
from mgm_exp.search.outcome import Outcome
from mgm_exp.search.space import Point
from mgm_exp.slots import in_sweep
from mgm_exp.store import Lease


@dataclass
class Trial:
    """A trial that this sweeper works on.

    Args:
        folder: Of the trial: its run folder, or that of its seeds' run folders.
        claim: Held until the trial is over, or left to another sweeper.
        seeds: Those that are still to run; None: that of the configuration.
        outcomes: Of those that have.
        until: Step at which its first seed pauses; None: it runs to its end.
    """

    number: int
    folder: Path
    claim: Lease
    point: Point
    config: ExperimentConfig
    seeds: list[int | None]
    outcomes: list[Outcome] = field(default_factory=list)
    losses: int = 0
    until: int | None = None

    @property
    def pause_after(self) -> int | None:
        """Where the run that is next pauses: the first seed climbs, the others follow when it has come to its end."""
        return None if self.outcomes else self.until

    @property
    def run_dir(self) -> Path:
        """Of the run that is next."""
        seed = self.seeds[0]
        return self.folder if seed is None else self.folder / subfolder(seed)


def overrides_of(number: int, point: Point, seed: int | None, sweep: str) -> list[str]:
    """All that one run of a trial is given."""
    subdir = str(number) if seed is None else f"{number}/{subfolder(seed)}"
    of_seed = [] if seed is None else [f"seed={seed}"]
    return [*point.overrides, *of_seed, *in_sweep(number, sweep, subdir)]
