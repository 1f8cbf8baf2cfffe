"""Rungs: every trial pauses at one with its state kept, and the best of them go on (ASHA in its promotion form).

Li et al., A System for Massively Parallel Hyperparameter Tuning, arXiv 1810.05934, algorithm 2; with ``synchronous`` a
rung is complete before any trial leaves it (successive halving). A rung is an optimizer step of the instruct stage:

    step(k) = first * factor ** k        first: the first validation point at or after sweep.pruner.min_step

The last rung is a trial's full length, whatever that is: a trial ends there by itself. Nothing here is remembered. What
a trial has reported (the study), how far it was allowed to go and whether it has paused there say all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from mgm_exp.config import Direction, ExperimentConfig, PrunerName

# User attributes of a trial in the study: the step at which it is to pause, and the one at which it has.
UNTIL, PAUSED = "until", "paused"


def is_paused(attributes: Mapping[str, Any]) -> bool:
    """Whether a trial that runs for the study waits at its rung, by its user attributes."""
    return PAUSED in attributes and int(attributes[PAUSED]) >= int(attributes.get(UNTIL, 0))


class Standing(Enum):
    """What a trial does now.

    ``at_work``: it runs, or waits for a slot. ``paused``: it waits to be promoted. ``dropped``: it was paused when the
    search ended; a longer search may want it back. ``completed``, ``ended`` (in any other way).
    """

    at_work = "at_work"
    paused = "paused"
    dropped = "dropped"
    completed = "completed"
    ended = "ended"


# While there is one of these, the search has a winner, or may come to have one.
_WINNERS = (Standing.at_work, Standing.completed)


@dataclass(frozen=True)
class Climber:
    """One trial on the ladder.

    Args:
        number: The trial's.
        standing: What it does now.
        until: Step at which it pauses, or has paused.
        points: Step -> score of its validation points.
    """

    number: int
    standing: Standing
    until: int
    points: Mapping[int, float]

    def at(self, step: int) -> float | None:
        """Its score at a rung: of the first point there or later; None where it has not come so far.

        One that completed before the rung (early stopping, a shorter schedule) has its last score there.
        """
        later = [point for point in self.points if point >= step]
        if later:
            return self.points[min(later)]
        if self.standing is Standing.completed and self.points:
            return self.points[max(self.points)]
        return None


@dataclass(frozen=True)
class Ladder:
    """The rungs of a search, and who climbs to the next one.

    Args:
        first: Step of the first rung.
        factor: One of so many trials goes on from each rung to the next, which is so many times as far.
        synchronous: Whether a rung is complete before any trial leaves it.
        direction: Which end of a score is better.
    """

    first: int
    factor: int
    synchronous: bool
    direction: Direction

    @classmethod
    def of(cls, config: ExperimentConfig, direction: Direction) -> Ladder | None:
        """Of a search with ``sweep.pruner.name=rungs``; None where no trial pauses."""
        pruner, every = config.sweep.pruner, config.train.validation.every_steps
        if pruner.name is not PrunerName.rungs or every is None:
            return None
        first = every * math.ceil((pruner.min_step or every) / every)
        return cls(first, pruner.reduction_factor, pruner.synchronous, direction)

    def step(self, rung: int) -> int:
        """The optimizer step of a rung, counted from 0."""
        return self.first * self.factor**rung

    def next_up(self, climbers: Sequence[Climber], *, all_drawn: bool) -> tuple[Climber, int] | None:
        """Who goes on now, and to which step; the highest rung first, there the best, of equals the lower number.

        Of n trials that have come to a rung, ``n // factor`` may leave it: as soon as they are that many, or, if
        synchronous, when nobody can come to this rung any more. Then one may leave it in any case: the search is to
        have a winner.

        Args:
            climbers: All trials of the search.
            all_drawn: Whether no new trial will begin.
        """
        waiting = [c for c in climbers if c.standing in (Standing.paused, Standing.dropped)]
        heights = {c.number: self._height(c) for c in waiting}
        found, is_closed = None, all_drawn
        for rung in range(max(heights.values(), default=-1) + 1):
            step = self.step(rung)
            is_closed = is_closed and not any(c.standing is Standing.at_work and c.until <= step for c in climbers)
            there = self._ranked(climbers, step)
            share = len(there) // self.factor
            quota = max(1, share) if is_closed else 0 if self.synchronous else share
            best = next((c for c in there[:quota] if heights.get(c.number) == rung), None)
            if best is not None:
                found, is_closed = (best, self.step(rung + 1)), False
        if found is None and all_drawn and not any(c.standing in _WINNERS for c in climbers):
            rung = max(heights.values(), default=-1)  # whoever was to win has failed: the next one goes on
            last = [c for c in self._ranked(climbers, self.step(rung)) if heights.get(c.number) == rung >= 0]
            return (last[0], self.step(rung + 1)) if last else None
        return found

    def counts(self, climbers: Sequence[Climber]) -> list[tuple[int, int]]:
        """``(step, trials that have come so far)`` of every rung that a trial has paused at."""
        top = max((c.until for c in climbers if c.standing is not Standing.at_work and c.points), default=0)
        steps: list[int] = []
        while self.step(len(steps)) <= top:
            steps.append(self.step(len(steps)))
        reached = [(step, sum(any(p >= step for p in c.points) for c in climbers)) for step in steps]
        return [(step, count) for step, count in reached if count]

    def _height(self, climber: Climber) -> int:
        """The highest rung that a paused trial has come to; -1: none."""
        rung = 0
        while self.step(rung) <= max(climber.points, default=0):
            rung += 1
        return rung - 1

    def _ranked(self, climbers: Sequence[Climber], step: int) -> list[Climber]:
        """Those that have come to a rung, the best first; a score that is no number is the worst."""
        sign = -1.0 if self.direction is Direction.maximize else 1.0
        scored = [(climber.at(step), climber) for climber in climbers]
        keyed = [
            ((math.isnan(value), 0.0 if math.isnan(value) else sign * value, climber.number), climber)
            for value, climber in scored
            if value is not None
        ]
        return [climber for _, climber in sorted(keyed, key=lambda pair: pair[0])]
