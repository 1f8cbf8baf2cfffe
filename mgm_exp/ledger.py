"""``sweep.json``: which trials a sweep has, how each ended, and which is the best.

A trial's number is its folder and never changes: the same command finds it again by what is swept and by the hash of
its configuration. What happened in a trial is read from the trial's own ``result.json``; the ledger only keeps books,
and is rewritten whole after each trial (of a very large sweep: every few seconds).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mgm_exp.config import Direction
from mgm_exp.errors import UserError
from mgm_exp.folders import read_record
from mgm_exp.grid import Cell
from mgm_exp.repeats import mean_metrics, subfolder
from mgm_exp.rows import Allowance, encode_row, encode_rows
from mgm_exp.store import write_atomic

SCHEMA_VERSION = 1
FILE = "sweep.json"
STATUSES = ("completed", "failed", "pruned", "interrupted")


@dataclass(frozen=True)
class Trial:
    """One trial of a sweep.

    Args:
        number: Its number, and the name of its folder.
        overrides: All that the command line gave it.
        params: What is swept, and this trial's values.
        config_hash: Of its configuration; None where it does not compose.
        status: None while it has not ended.
        metrics: Of ``result.json``.
        run_dir: Relative to the sweep's folder.
        seconds: Wall time of its last run; of all its seeds where it has several.
        error: Of ``result.json``.
        seeds: It runs once for each of these, and its metrics are their means; empty: it runs once.
    """

    number: int
    overrides: list[str]
    params: dict[str, Any]
    config_hash: str | None
    status: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    run_dir: str = ""
    seconds: float | None = None
    error: dict[str, Any] | None = None
    seeds: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """One run of a trial: the only one, or that of a seed.

    Args:
        folder: Where it writes.
        seed: None where the trial runs once.
        status: As :attr:`Trial.status`.
    """

    trial: Trial
    folder: Path
    seed: int | None
    status: str | None

    def __str__(self) -> str:
        return f"{self.trial.number}" if self.seed is None else f"{self.trial.number} seed={self.seed}"


class Ledger:
    """The books of one sweep, in its folder.

    Args:
        folder: The sweep's folder.
        name: Its name.
        objective: The metric that orders the trials.
        direction: Which end of it is better.
    """

    def __init__(self, folder: Path, name: str, objective: str, direction: Direction) -> None:
        self.folder, self.name, self.objective, self.direction = folder, name, objective, direction
        self.trials: dict[int, Trial] = {}
        self.grid: list[int] = []
        self.command: list[str] = []
        self.status = "running"
        self._rows: dict[int, tuple[Trial, dict[str, Any], str]] = {}
        self._allowance, self._is_behind = Allowance(), False
        for entry in _entries(folder / FILE):
            self.trials[entry.number] = self.refreshed(entry)

    def enrol(self, cells: Sequence[tuple[Cell, str | None]], seeds: Sequence[list[int]] | None = None) -> list[Trial]:
        """The trials of these cells: known ones keep their number, new ones take the next free ones.

        A trial is known by what is swept and by its configuration; one that did not compose by what is swept alone.

        Args:
            cells: Each with the hash of its configuration, None where it does not compose.
            seeds: Of each cell; None: every cell runs once.
        """
        chosen = []
        taken: set[int] = set()
        by_params: dict[str, list[Trial]] = {}
        for trial in self.trials.values():
            by_params.setdefault(_canonical(trial.params), []).append(trial)
        free = self._next_number()
        for (cell, config_hash), of_cell in zip(cells, seeds or [[]] * len(cells), strict=True):
            alike = by_params.get(_canonical(cell.params), [])
            known = [t for t in alike if t.config_hash in (config_hash, None) and t.number not in taken]
            if known:
                number = max(known, key=lambda t: t.config_hash is not None).number
            else:
                number, free = free, free + 1
            fresh = Trial(number, _lasting(cell.overrides), cell.params, config_hash, run_dir=str(number))
            old = self.trials.get(number)
            trial = replace(old, overrides=fresh.overrides, config_hash=config_hash) if old else fresh
            if trial.seeds != of_cell:
                trial = self.refreshed(replace(trial, seeds=of_cell))
            self.trials[number] = trial
            taken.add(number)
            chosen.append(trial)
        self.grid = [trial.number for trial in chosen]
        for trial in list(self.trials.values()):
            if trial.status is None and trial.number not in taken:
                del self.trials[trial.number]  # announced by an earlier command, never begun, and not wanted any more
        return chosen

    def _next_number(self) -> int:
        used = set(self.trials)
        if self.folder.is_dir():
            used |= {int(path.name) for path in self.folder.iterdir() if path.name.isdigit()}
        return max(used, default=-1) + 1

    def run_dir(self, trial: Trial) -> Path:
        """The trial's folder."""
        return self.folder / trial.run_dir

    def runs(self, trials: Iterable[Trial]) -> Iterator[Run]:
        """The runs of some trials: all of the first seed before the second, since seeds decide the early stages."""
        listed = list(trials)
        for place in range(max((len(trial.seeds) for trial in listed), default=0) or 1):
            for trial in listed:
                if place < max(1, len(trial.seeds)):
                    yield self._run(trial, place)

    def _run(self, trial: Trial, place: int) -> Run:
        if not trial.seeds:
            return Run(trial, self.run_dir(trial), None, trial.status)
        seed = trial.seeds[place]
        folder = self.run_dir(trial) / subfolder(seed)
        return Run(trial, folder, seed, state_of(folder))

    def refreshed(self, trial: Trial) -> Trial:
        """The trial with what its folder says now."""
        folders = [self.run_dir(trial) / subfolder(seed) for seed in trial.seeds]
        if not any(folder.is_dir() for folder in folders):
            folders = [self.run_dir(trial)]
        status = _status_of([state_of(folder) for folder in folders])
        if status is None:
            return replace(trial, status=None)
        results = [read_record(folder / "result.json") for folder in folders]
        seconds = [result["wall_s"] for result in results if result.get("wall_s") is not None]
        return replace(
            trial,
            status=status,
            metrics=mean_metrics(results) if status == "completed" or len(results) == 1 else {},
            seconds=sum(seconds) if seconds else None,
            error=next((result["error"] for result in results if result.get("error")), None),
        )

    def note(self, trial: Trial) -> Trial:
        """Reads how the trial ended and rewrites ``sweep.json``, or soon. Returns the trial as it is now."""
        self.trials[trial.number] = self.refreshed(trial)
        self.catch_up(is_news=True)
        return self.trials[trial.number]

    def catch_up(self, *, is_news: bool = False) -> None:
        """Rewrites ``sweep.json`` if it is behind (or there is news) and worth it now."""
        if is_news or self._is_behind:
            self._is_behind = not self._allowance.allows()
            if not self._is_behind:
                self.write()

    def value(self, trial: Trial) -> float | None:
        """The objective of a completed trial."""
        return trial.metrics.get(self.objective) if trial.status == "completed" else None

    def best(self) -> Trial | None:
        """The completed trial with the best objective; of equal ones the first."""
        scored = [trial for trial in self.trials.values() if self.value(trial) is not None]
        sign = -1.0 if self.direction is Direction.maximize else 1.0
        return min(scored, key=lambda trial: (sign * (self.value(trial) or 0.0), trial.number), default=None)

    def _row(self, trial: Trial) -> tuple[Trial, dict[str, Any], str] | None:
        """How a trial stands in ``sweep.json``, and as text; None where its folder is not there yet."""
        known = self._rows.get(trial.number)
        if known is not None and known[0] is trial:
            return known
        if trial.status is None or not self.run_dir(trial).is_dir():
            return None
        row = asdict(trial)
        self._rows[trial.number] = (trial, row, encode_row(row))
        return self._rows[trial.number]

    def _content(self) -> tuple[dict[str, Any], list[tuple[Trial, dict[str, Any], str]]]:
        """Everything but the trials that ended, and these. Whose folder is not there yet stands under ``pending``."""
        shown = [(self.trials[number], self._row(self.trials[number])) for number in sorted(self.trials)]
        best = self.best()
        content = {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "status": self.status,
            "direction": self.direction.value,
            "objective": self.objective,
            "command": self.command,
            "grid": self.grid,
            "seeds": max((len(trial.seeds) or 1 for trial in self.trials.values()), default=1),
            "trials": [],
            "pending": [
                {key: getattr(t, key) for key in ("number", "overrides", "params", "config_hash", "seeds")}
                for t, row in shown
                if row is None
            ],
            "best": best and {"number": best.number, "value": self.value(best), "run_dir": best.run_dir},
        }
        return content, [row for _, row in shown if row is not None]

    def write(self) -> dict[str, Any]:
        """Rewrites ``sweep.json`` whole and returns what was written."""
        began = time.monotonic()
        content, rows = self._content()
        write_atomic(self.folder / FILE, encode_rows(content, FILE, [text for _, _, text in rows]))
        self._allowance.spent(time.monotonic() - began)
        self._is_behind = False
        return {**content, "trials": [row for _, row, _ in rows]}


def state_of(folder: Path) -> str | None:
    """How a run ended; ``interrupted`` where it began and did not, None where it did not begin."""
    status = read_record(folder / "result.json").get("status")
    if status in STATUSES:
        return str(status)
    return "interrupted" if any((folder / name).exists() for name in ("config.yaml", "manifest.json")) else None


def _status_of(states: Sequence[str | None]) -> str | None:
    """How a trial stands, from how its runs do."""
    for state in ("failed", "pruned"):
        if state in states:
            return state
    if all(state == "completed" for state in states):
        return "completed"
    return None if all(state is None for state in states) else "interrupted"


def in_words(params: dict[str, Any]) -> str:
    """What is swept and its values, as they would be typed."""
    words = {None: "null", True: "true", False: "false"}
    shown = {key: words[value] if value is None or isinstance(value, bool) else value for key, value in params.items()}
    return " ".join(f"{key}={value}" for key, value in shown.items()) or "(nothing is swept)"


def _entries(path: Path) -> list[Trial]:
    """The trials of an earlier command.

    Raises:
        UserError: the file is there and cannot be read: nothing is guessed, and nothing overwritten.
    """
    if not path.exists():
        return []
    try:
        content = read_record(path)
        rows = [*content["trials"], *content.get("pending", [])]
        return [
            Trial(
                int(row["number"]),
                [str(item) for item in row["overrides"]],
                dict(row["params"]),
                row.get("config_hash"),
                run_dir=str(int(row["number"])),
                seeds=[int(seed) for seed in row.get("seeds") or []],
            )
            for row in rows
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {error}).",
            advice="Move it away: trials are then numbered anew, and what they made is taken from the store.",
        ) from error


def _lasting(overrides: Sequence[str]) -> list[str]:
    """Without what only says how this one command treats its trials."""
    return [item for item in overrides if not item.lstrip("+").startswith("sweep.rerun=")]


def _canonical(params: dict[str, Any]) -> str:
    return json.dumps(params, sort_keys=True, default=str)
