"""Arms of a comparison: runs that differ in their seed alone are one arm, because they answer one question.

Where all runs would be one arm, each is an arm of its own: comparing the seeds is then what was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mgm_exp.compare.differences import labels
from mgm_exp.compare.runs import Run

SEED = "seed"


@dataclass(frozen=True)
class Arm:
    """One or several runs of one configuration.

    Args:
        id: How pairs name it: the name of its first completed run, else of its first run.
        label: Short and unique; without the seed where the arm has several.
        runs: In the order given, whatever became of them.
    """

    id: str
    label: str
    runs: tuple[Run, ...] = field(repr=False)

    @property
    def completed(self) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run.is_completed)

    @property
    def benchmarks(self) -> list[str]:
        """Benchmarks that some completed run has, in the order of the runs."""
        return list(dict.fromkeys(name for run in self.completed for name in run.benchmarks))

    @property
    def status(self) -> str:
        """completed where some run is; else what became of the first."""
        return "completed" if self.completed else self.runs[0].status


def arms_of(runs: Sequence[Run]) -> list[Arm]:
    """The arms, in the order of their first runs."""
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        groups.setdefault(_without_seed(run), []).append(run)
    grouped = [part for group in groups.values() for part in _parts(group)]
    if len(grouped) == 1:
        grouped = [[run] for run in runs]
    if all(len(group) == 1 for group in grouped):
        order = {run.name: place for place, run in enumerate(runs)}
        grouped.sort(key=lambda group: order[group[0].name])
        names = labels([group[0] for group in grouped])
    else:
        names = labels([_unseeded(group[0]) for group in grouped])
    return [Arm(_first(group).name, name, tuple(group)) for group, name in zip(grouped, names, strict=True)]


def _first(group: Sequence[Run]) -> Run:
    return next((run for run in group if run.is_completed), group[0])


def _parts(group: Sequence[Run]) -> list[list[Run]]:
    """Runs of one configuration as arms: one of all seeds; the same seed twice is a repetition, not another draw."""
    done = [run for run in group if run.is_completed]
    if not _has_seeds(done):
        return [[run] for run in group]
    seeds = {str(_seed(run)) for run in done}
    together = list(done)
    for run in group:
        if not run.is_completed and _seed(run) is not None and str(_seed(run)) not in seeds:
            seeds.add(str(_seed(run)))
            together.append(run)
    alone = [[run] for run in group if run not in together]
    return [[run for run in group if run in together], *alone] if together else alone


def _has_seeds(group: Sequence[Run]) -> bool:
    seeds = [str(_seed(run)) for run in group]
    return all(_seed(run) is not None for run in group) and len(set(seeds)) == len(seeds)


def _seed(run: Run) -> Any:
    return run.params.get(SEED, run.seed)


def _without_seed(run: Run) -> Any:
    """What makes two runs the same but for their seed; a run that left nothing behind is like no other."""
    settings = run.config or run.params
    return _frozen(_dropped(settings)) if settings else run.name


def _frozen(settings: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((key, repr(value)) for key, value in settings.items()))


def _dropped(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != SEED}


def _unseeded(run: Run) -> Run:
    return replace(run, params=_dropped(run.params), config=_dropped(run.config))
