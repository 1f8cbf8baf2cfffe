"""What a run says of itself while it trains, and what it is told: go on, or stop.

Each validation point is a line of ``reports.jsonl`` in the run folder. A trial of a search also reports to the study's
storage, wherever it runs, and asks the pruner there; rungs and values are kept in the storage, so nothing of it is lost
when processes are. A point that was reported before the run was interrupted is not reported again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgm_exp.config import ExperimentConfig, PrunerName, SweepConfig
from mgm_exp.errors import Interrupted, MgmError
from mgm_exp.store import parse_record, read_record, write_atomic

FILE = "reports.jsonl"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """One validation point.

    Args:
        step: Optimizer step of the instruct stage.
        value: The score there.
        stop: Whether the pruner said to stop.
    """

    step: int
    value: float
    stop: bool = False


class Reporter:
    """Writes validation points down and passes the pruner's answers on.

    Args:
        run_dir: The run's folder.
        trial: Gives the Optuna trial that this run belongs to, on first use, or None; None: the run is no trial of a
            search, or one that cannot be pruned.
        pause_after: The run pauses at its first validation point at or after this step; None: it does not pause.
    """

    def __init__(self, run_dir: Path, trial: Callable[[], Any] | None = None, pause_after: int | None = None) -> None:
        self.path = Path(run_dir) / FILE
        self._open = trial
        self._trial: Any = None
        self.reports = read_reports(self.path)
        self._known = {report.step for report in self.reports}
        self._pause_after = pause_after

    @property
    def was_stopped(self) -> bool:
        """Whether the pruner has said so already, in this run or in the one that this one continues."""
        return any(report.stop for report in self.reports)

    @property
    def is_paused(self) -> bool:
        """Whether the run has come to where it is to pause."""
        return self._pause_after is not None and self.last_step >= self._pause_after

    @property
    def last_step(self) -> int:
        """Step of the last validation point; 0 before the first."""
        return max((report.step for report in self.reports), default=0)

    def report(self, step: int, value: float) -> bool:
        """Notes a validation point; whether the run should stop."""
        if step in self._known:
            return self.was_stopped or self.is_paused
        stop = self._ask(step, value)
        self._known.add(step)
        self.reports.append(Report(step, value, stop))
        # Whole, not appended: behind a line that a kill tore nothing could be read.
        write_atomic(self.path, "".join(_line(report) for report in self.reports))
        return stop or self.is_paused

    def _ask(self, step: int, value: float) -> bool:
        if self._open is None:
            return False
        try:
            if self._trial is None:
                self._trial = self._open()
            if self._trial is None:
                self._open = None
                return False
            self._trial.report(value, step)
            return bool(self._trial.should_prune())
        except Interrupted:  # a signal: it has nothing to do with the study
            raise
        except MgmError as error:
            reason = str(error)
        except Exception as error:  # noqa: BLE001 - a database that is away must not end a training run
            reason = f"{type(error).__name__}: {error}"
        log.warning("the study does not answer (%s); this run goes on without being pruned", reason)
        self._open = None
        return False


def reporter_for(config: ExperimentConfig, run_dir: Path) -> Reporter:
    """The reporter of a run; one of a search's trial reports to the study and asks its pruner."""
    sweep = config.sweep
    can_be_pruned = (
        config.trial is not None
        and sweep.pruner.name not in (PrunerName.none, PrunerName.wilcoxon)
        and not sweep.objectives
        and _is_first_seed(run_dir)
    )
    if not can_be_pruned:
        return Reporter(run_dir, pause_after=sweep.pause_after)
    number = config.trial
    assert number is not None
    return Reporter(
        run_dir, lambda: trial_in_study(sweep, sweep_folder(run_dir), number, config), pause_after=sweep.pause_after
    )


def _is_first_seed(run_dir: Path) -> bool:
    """Of a trial with several seeds one run reports: steps of two would be taken for steps of one."""
    if not run_dir.name.startswith("seed_"):
        return True
    numbers = [int(path.name.removeprefix("seed_")) for path in run_dir.parent.glob("seed_*")]
    return int(run_dir.name.removeprefix("seed_")) <= min(numbers, default=0)


def sweep_folder(run_dir: Path) -> Path:
    """The sweep's folder of a trial's run folder (``<sweep>/<number>`` or ``<sweep>/<number>/seed_<s>``)."""
    return run_dir.parents[1] if run_dir.name.startswith("seed_") else run_dir.parent


def trial_in_study(sweep: SweepConfig, folder: Path, number: int, config: ExperimentConfig) -> Any:
    """The Optuna trial of this run, opened in this process; None for a trial of a grid, which has no study."""
    if _is_grid(folder):
        return None
    import optuna

    from mgm_exp.search.pruners import make_pruner
    from mgm_exp.search.study import open_storage, storage_place, trial_of

    study = optuna.load_study(
        study_name=study_name(folder),
        storage=open_storage(storage_place(sweep.storage, folder)),
        sampler=optuna.samplers.RandomSampler(),
        pruner=make_pruner(sweep.pruner, config.train.validation.every_steps),
    )
    return trial_of(study, number)


def _is_grid(folder: Path) -> bool:
    """Whether the sweep keeps books and is no search."""
    try:
        books = read_record(folder / "sweep.json")
    except (OSError, ValueError):
        return False
    return isinstance(books, dict) and "sweeper" not in books


def study_name(folder: Path) -> str:
    """How a sweep's study is called in its storage: a database may hold many."""
    return folder.name


def read_reports(path: Path) -> list[Report]:
    """The validation points of a run folder."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = parse_record(line)
            rows.append(Report(int(row["step"]), float(row["value"]), bool(row.get("stop"))))
        except (ValueError, KeyError, TypeError):
            continue  # damaged from outside: that point is reported again
    return rows


def _line(report: Report) -> str:
    return json.dumps({"step": report.step, "value": report.value, "stop": report.stop}) + "\n"
