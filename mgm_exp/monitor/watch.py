"""Follows a run by the rules, without Prometheus: what happens goes in, the alerts that are raised come out."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from mgm_exp.config import MonitorLimitsConfig
from mgm_exp.monitor.rules import AlertRule, rules
from mgm_exp.monitor.window import SPIKE_WINDOW, Row, Step, Window, is_step, spike_of

# Steps and samples that are kept at most: memory is bounded however long a run is.
MOST_STEPS = 4096
MOST_SAMPLES = 1024


@dataclass(frozen=True)
class Alert:
    """A rule that has held for its time: since when, and what was seen last."""

    rule: AlertRule
    since: float
    detail: str


class Watch:
    """The window of one run, and since when each rule holds. Threads may share it.

    Args:
        limits: When the rules hold.

    Example:
        >>> watch = Watch(MonitorLimitsConfig())
        >>> watch.stage_started(0.0)
        >>> watch.row({"stage": "instruct", "step": 1, "loss": None, "event": "not_finite"}, 1.0)
        >>> [(alert.rule.name, alert.detail) for alert in watch.raised(2.0)]
        [('TrainLossNaN', '1 step(s) of the last 300 s, the last one instruct step 1')]
    """

    def __init__(self, limits: MonitorLimitsConfig) -> None:
        self.limits = limits
        self.rules = rules(limits)
        self._steps: deque[Step] = deque(maxlen=MOST_STEPS)
        self._samples: deque[Row] = deque(maxlen=MOST_SAMPLES)
        self._sign_at: float | None = None
        self._since: dict[str, float] = {}
        self._lock = threading.Lock()

    def stage_started(self, now: float) -> None:
        """A stage begins to train; what another one did is no measure for it."""
        with self._lock:
            self._steps.clear()
            self._sign_at = now

    def stage_finished(self) -> None:
        """Nothing trains now."""
        with self._lock:
            self._sign_at = None

    def row(self, row: Row, now: float) -> Step | None:
        """Takes a row in; the step that it is, or None for an event."""
        with self._lock:
            if self._sign_at is not None:
                self._sign_at = now
            if not is_step(row):
                return None
            before = [step.row for step in list(self._steps)[-SPIKE_WINDOW:]]
            step = Step(now, row, spike_of(row, before, self.limits))
            self._steps.append(step)
            return step

    def sample(self, sample: Row) -> None:
        """Takes a line of ``system.jsonl`` in."""
        with self._lock:
            self._samples.append(sample)

    def window(self, now: float) -> Window:
        """What is known now."""
        with self._lock:
            return Window(now, tuple(self._steps), tuple(self._samples), self._sign_at)

    def raised(self, now: float) -> Sequence[Alert]:
        """The alerts that are raised now. A rule that stopped holding begins anew."""
        window, found = self.window(now), []
        for rule in self.rules:
            detail = rule.check(window) if rule.check is not None else None
            if detail is None:
                self._since.pop(rule.name, None)
                continue
            since = self._since.setdefault(rule.name, now)
            if now - since >= rule.for_s:
                found.append(Alert(rule, since, detail))
        return found
