"""The failed trials of a sweep, by what they failed of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgm_exp.doctor.case import case_of_run, is_run
from mgm_exp.doctor.diagnosis import Diagnosis, diagnose
from mgm_exp.doctor.reading import shown
from mgm_exp.doctor.wording import in_words
from mgm_exp.errors import UserError
from mgm_exp.store import read_record

# Of more failed trials the last ones are looked at.
MOST_TRIALS = 500
MOST_NAMED = 12


@dataclass(frozen=True)
class SweepDiagnosis:
    """What became of the trials that did not complete.

    Args:
        name: The sweep's folder.
        trials: How many there are.
        cases: Number of the trial (and its seed) -> what was found, of those that did not complete.
        passed_over: Failed trials that were not looked at.
    """

    name: str
    trials: int
    cases: dict[str, Diagnosis]
    passed_over: int = 0

    @property
    def is_well(self) -> bool:
        """Whether no trial has anything."""
        return all(found.is_well for found in self.cases.values())

    def groups(self) -> dict[str, list[str]]:
        """Id of the likeliest cause (or ``unknown``) -> trials, the most frequent first."""
        found: dict[str, list[str]] = {}
        for trial, diagnosis in self.cases.items():
            if not diagnosis.is_well:
                cause = diagnosis.findings[0].entry.id if diagnosis.findings else "unknown"
                found.setdefault(cause, []).append(trial)
        return dict(sorted(found.items(), key=lambda item: -len(item[1])))

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "schema_version": 1,
            "name": self.name,
            "trials": self.trials,
            "not_looked_at": self.passed_over,
            "groups": [
                {"cause": cause, "trials": trials, "example": self.cases[trials[0]].as_json()}
                for cause, trials in self.groups().items()
            ],
        }

    def in_words(self) -> str:
        """One paragraph for each cause, with one trial as its example."""
        groups = self.groups()
        count = sum(map(len, groups.values()))
        lines = [f"{self.name}: {count} of {self.trials} trials have something"]
        if self.passed_over:
            lines.append(f"note: {self.passed_over} more did not complete and were not looked at")
        for cause, trials in groups.items():
            named = ", ".join(trials[:MOST_NAMED]) + (", ..." if len(trials) > MOST_NAMED else "")
            lines += [
                "",
                f"== {cause}: {len(trials)} trial(s): {named}",
                f"   for example {in_words(self.cases[trials[0]])}",
            ]
        return shown("\n".join(lines))


def is_sweep(folder: Path) -> bool:
    """Whether a folder is a sweep's."""
    return (folder / "sweep.json").is_file()


def diagnose_sweep(folder: Path) -> SweepDiagnosis:
    """Looks at every trial that went wrong or broke off.

    Raises:
        UserError: ``sweep.json`` is damaged.
    """
    try:
        record = read_record(folder / "sweep.json")
        trials = record["trials"]
        entries = [(int(trial["number"]), str(trial["status"])) for trial in trials]
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{folder / 'sweep.json'} is damaged: {error}.") from error
    wanted = [number for number, status in sorted(entries) if status not in ("completed", "pruned", "paused")]
    looked_at = wanted[-MOST_TRIALS:]
    cases = {name: diagnose(case_of_run(place)) for number in looked_at for name, place in _runs(folder, number)}
    return SweepDiagnosis(str(folder), len(entries), cases, len(wanted) - len(looked_at))


def _runs(folder: Path, number: int) -> Iterator[tuple[str, Path]]:
    """The run folders of a trial: one, or one for each seed."""
    trial = folder / str(number)
    seeds = sorted(path for path in trial.glob("seed_*") if path.is_dir())
    for place in seeds or [trial]:
        if is_run(place):
            yield (f"{number}/{place.name}" if seeds else str(number)), place
