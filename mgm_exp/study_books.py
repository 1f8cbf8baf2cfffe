"""``sweep.json`` of a search: every trial of the study, how it ended, the best, the Pareto front.

The study's storage and the trials' folders are the truth; this file is derived from them, and any sweeper that works on
the study can write it. A trial's number is its folder.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgm_exp.config import Direction
from mgm_exp.folders import read_record
from mgm_exp.ledger import FILE, SCHEMA_VERSION
from mgm_exp.repeats import mean_metrics, run_dirs
from mgm_exp.rows import Allowance, encode_row, encode_rows
from mgm_exp.search.outcome import Verdict
from mgm_exp.search.rungs import is_paused
from mgm_exp.store import Lease, write_atomic

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

CLAIMS = ".claims"
# User attributes of a trial in the study.
POINT, VERDICT, REASON, LOSSES, VALUES = "point", "verdict", "reason", "losses", "values"
# Of a trial that repeats a failed one: that one's number.
AGAIN_FOR = "again_for"
# Trials that were refused before they ran, or that another number repeats, do not count as trials of the sweep.
REFUSED = "refused"


@dataclass(frozen=True)
class Entry:
    """One trial as ``sweep.json`` shows it; see :func:`entry_of`."""

    number: int
    overrides: list[str]
    params: dict[str, Any]
    config_hash: str | None
    status: str | None
    verdict: str | None
    metrics: dict[str, float]
    values: list[float] | None
    run_dir: str
    seconds: float | None
    error: dict[str, Any] | None
    is_feasible: bool = True
    is_counted: bool = True
    dates: tuple[float | None, float | None] = field(default=(None, None))

    def to_json(self) -> dict[str, Any]:
        """As it stands in ``sweep.json``."""
        hidden = ("is_feasible", "is_counted", "dates")
        return {key: value for key, value in vars(self).items() if key not in hidden} | {"feasible": self.is_feasible}


def steps_of(folder: Path, numbers: Iterable[int], seeds: int) -> tuple[int, int]:
    """Optimizer steps of the instruct stage: those that trials have run, and those of running all to their ends.

    Args:
        folder: The sweep's.
        numbers: Its trials.
        seeds: Runs of each trial that comes to its end.
    """
    run, planned = 0, []
    for number in numbers:
        results = [read_record(path / "result.json") for path in run_dirs(folder / str(number))]
        run += sum(int(result.get("steps") or 0) for result in results)
        first = results[0]  # one that completed early (early stopping) would have done so in any case
        planned.append(int(first.get("steps" if first.get("status") == "completed" else "planned_steps") or 0))
    longest = max(planned, default=0)
    return run, seeds * sum(steps or longest for steps in planned)


class StudyBooks:
    """The books of one search.

    Args:
        folder: The sweep's folder.
        name: Its name.
        objectives, directions: What is to be large or small.
        study: The Optuna study.
    """

    def __init__(
        self, folder: Path, name: str, objectives: Sequence[str], directions: Sequence[Direction], study: Study
    ) -> None:
        self.folder, self.name, self.study = folder, name, study
        self.objectives, self.directions = list(objectives), list(directions)
        self.command: list[str] = []
        self.plan: dict[str, Any] = {}
        self.status = "running"
        self.stopped_because = ""
        self._final: dict[int, Entry] = {}
        self._rows: dict[int, tuple[dict[str, Any], str]] = {}  # of trials that are over, as they stand in the file
        self._allowance = Allowance()
        self.is_behind = False

    def claim(self, number: int) -> Lease:
        """The lease of a trial: whoever holds it works on the trial."""
        return Lease(self.folder / CLAIMS / str(number))

    def entries(self) -> list[Entry]:
        """Every trial of the study that was drawn, by number."""
        found = []
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state.name == "WAITING":
                continue
            known = self._final.get(trial.number)
            if known is None:
                known = self._entry(trial)
                if trial.state.is_finished():
                    self._final[trial.number] = known
            found.append(known)
        return found

    def _entry(self, trial: FrozenTrial) -> Entry:
        attributes = trial.user_attrs
        point = attributes.get(POINT) or {"overrides": [], "params": {}, "config_hash": None}
        run_dir = self.folder / str(trial.number)
        results = [read_record(path / "result.json") for path in run_dirs(run_dir)]
        verdict = attributes.get(VERDICT)
        if trial.state.is_finished():
            status: str | None = Verdict(verdict).status if verdict in Verdict.__members__ else "failed"
        else:
            is_running = self.claim(trial.number).holder() is not None
            is_waiting = is_paused(attributes) and not is_running
            began = any((path / "config.yaml").exists() for path in run_dirs(run_dir))
            status = "paused" if is_waiting else "interrupted" if began and not is_running else None
        reason = attributes.get(REASON)
        error = next((result["error"] for result in results if result.get("error")), None)
        if error is None and reason:
            error = {"type": "", "message": str(reason), "cause": "", "advice": ""}
        return Entry(
            number=trial.number,
            overrides=list(point["overrides"]),
            params=dict(point["params"]),
            config_hash=point["config_hash"],
            status=status,
            verdict=verdict or (status if status == "paused" else None),
            metrics=mean_metrics(results),
            values=attributes.get(VALUES),
            run_dir=str(trial.number),
            seconds=sum(float(result.get("wall_s") or 0.0) for result in results) if results else None,
            error=error if status not in ("completed", "paused") else None,
            is_feasible=not any(violation > 0 for violation in attributes.get("violations", ())),
            is_counted=verdict != REFUSED,
            dates=tuple(date.timestamp() if date else None for date in (trial.datetime_start, trial.datetime_complete)),  # type: ignore[arg-type]
        )

    def repeated(self) -> set[int]:
        """Failed trials that another one repeats, or will: they do not count any more."""
        trials = self.study.get_trials(deepcopy=False)
        return {int(trial.user_attrs[AGAIN_FOR]) for trial in trials if AGAIN_FOR in trial.user_attrs}

    def counted(self) -> list[Entry]:
        """The trials that the sweep has: without those that were refused, or that another one repeats."""
        repeated = self.repeated()
        return [entry for entry in self.entries() if entry.is_counted and entry.number not in repeated]

    def best(self, entries: Sequence[Entry]) -> Entry | None:
        """The completed, feasible trial with the best value (of the first objective); of equal ones the first."""
        sign = -1.0 if self.directions[0] is Direction.maximize else 1.0
        scored = [entry for entry in entries if entry.values and entry.status == "completed" and entry.is_feasible]
        return min(scored, key=lambda entry: (sign * (entry.values or [math.nan])[0], entry.number), default=None)

    def front(self, entries: Sequence[Entry]) -> list[Entry]:
        """The completed, feasible trials that no other one beats in every objective."""
        signs = [-1.0 if direction is Direction.maximize else 1.0 for direction in self.directions]
        scored = [
            ([sign * value for sign, value in zip(signs, entry.values, strict=True)], entry.number, entry)
            for entry in entries
            if entry.values and entry.status == "completed" and entry.is_feasible
        ]
        front: list[tuple[list[float], int, Entry]] = []
        for values, number, entry in sorted(scored, key=lambda item: item[:2]):  # no later one beats an earlier one
            if not any(
                all(a <= b for a, b in zip(other, values, strict=True)) and other != values for other, _, _ in front
            ):
                front.append((values, number, entry))
        return [entry for _, _, entry in sorted(front, key=lambda item: item[1])]

    def _row(self, entry: Entry) -> tuple[dict[str, Any], str] | None:
        """How a trial stands in ``sweep.json``, and as text; None where its folder is not there yet."""
        known = self._rows.get(entry.number)
        if known is not None:
            return known
        if entry.status is None or not (self.folder / entry.run_dir).is_dir():
            return None
        row = entry.to_json()
        found = (row, encode_row(row))
        if entry.number in self._final:
            self._rows[entry.number] = found
        return found

    def to_json(self) -> dict[str, Any]:
        """The content of ``sweep.json``."""
        content, rows = self._content()
        return {**content, "trials": [row for row, _ in rows]}

    def _content(self) -> tuple[dict[str, Any], list[tuple[dict[str, Any], str]]]:
        """Everything but the trials that ended, and these."""
        entries, repeated = self.entries(), self.repeated()
        shown = [(entry, self._row(entry)) for entry in entries if entry.verdict != REFUSED]
        ended = [entry for entry, row in shown if row is not None]
        best = self.best(ended)
        content: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "sweeper": "mgm_optuna",
            "status": self.status,
            "stopped_because": self.stopped_because,
            **self.plan,
            "direction": self.directions[0].value,
            "objective": self.objectives[0],
            "command": self.command,
            "grid": [entry.number for entry in entries if entry.is_counted and entry.number not in repeated],
            "trials": [],
            "pending": [
                {key: getattr(entry, key) for key in ("number", "overrides", "params", "config_hash")}
                for entry, row in shown
                if row is None
            ],
            "refused": [
                {"number": entry.number, "params": entry.params, "reason": (entry.error or {}).get("message", "")}
                for entry in entries
                if entry.verdict == REFUSED
            ],
            "best": best and {"number": best.number, "value": (best.values or [0.0])[0], "run_dir": best.run_dir},
        }
        if len(self.objectives) > 1:
            content["objectives"] = self.objectives
            content["directions"] = [direction.value for direction in self.directions]
            content["pareto"] = [
                {"number": entry.number, "values": entry.values, "run_dir": entry.run_dir}
                for entry in self.front(ended)
            ]
        return content, [row for _, row in shown if row is not None]

    def write(self) -> dict[str, Any]:
        """Rewrites ``sweep.json`` whole and returns what was written."""
        began = time.monotonic()
        content, rows = self._content()
        write_atomic(self.folder / FILE, encode_rows(content, FILE, [text for _, text in rows]))
        self._allowance.spent(time.monotonic() - began)
        self.is_behind = False
        return {**content, "trials": [row for row, _ in rows]}

    def may_write(self) -> bool:
        """Whether ``sweep.json`` is worth rewriting now; if not, it is behind until the next time."""
        self.is_behind = not self._allowance.allows()
        return not self.is_behind
