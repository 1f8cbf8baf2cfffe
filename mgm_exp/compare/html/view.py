"""A comparison as the page needs it: names, colours, and which pair belongs to which run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mgm_exp.compare.differences import choices, confounded, shown
from mgm_exp.compare.runs import Run

Cells = list[str | tuple[str, float | None]]
"""A row of a table: texts, and numbers as (what is shown, what is sorted by)."""
N_COLOURS = 8
"""Colours of the page's style sheet; the ninth run has the first one again, with dashes."""
N_DASHES = 4


@dataclass(frozen=True)
class View:
    """What was compared, by name.

    Args:
        comparison: What ``compare`` returned.
        runs: The runs it was made of, in the same order.
        folder: Where the page will lie; None: not known, and it links to no run.
    """

    comparison: Mapping[str, Any]
    runs: Sequence[Run]
    folder: Path | None = None

    @property
    def entries(self) -> Sequence[Mapping[str, Any]]:
        """The runs of the comparison, in its order."""
        found: Sequence[Mapping[str, Any]] = self.comparison["runs"]
        return found

    @property
    def completed(self) -> list[tuple[int, Mapping[str, Any]]]:
        """Place and entry of every completed run."""
        return [(k, entry) for k, entry in enumerate(self.entries) if entry["status"] == "completed"]

    def run(self, name: str) -> Run | None:
        """The folder behind a name of the comparison."""
        return next((run for run in self.runs if run.name == name), None)

    def link(self, name: str, file: str) -> str | None:
        """Address of a file of a run, as seen from the page; None where it is not there."""
        run = self.run(name)
        if run is None or self.folder is None or not (run.path / file).is_file():
            return None
        return quote(os.path.relpath(run.path.resolve() / file, self.folder.resolve()))

    def label(self, name: str) -> str:
        """What a run or an arm is called."""
        for key, entry in (*self._arms().items(), *((entry["run_dir"], entry) for entry in self.entries)):
            if key == name:
                return str(entry["label"])
        return name

    def members(self, name: str) -> list[str]:
        """The runs behind a name in ``pairs``: those of an arm, or the run itself."""
        arm = self._arms().get(name)
        return list(arm["runs"]) if arm else [name]

    def is_baseline(self, entry: Mapping[str, Any]) -> bool:
        """Whether a run is (of) the one that the others are compared with."""
        baseline = self.comparison["baseline"]
        return baseline is not None and entry["run_dir"] in (baseline, *self.members(baseline))

    def pair(self, entry: Mapping[str, Any], benchmark: str) -> Mapping[str, Any] | None:
        """The baseline against a run (or its arm)."""
        baseline = self.comparison["baseline"]
        return next(
            (
                pair
                for pair in self.comparison["pairs"]
                if pair["benchmark"] == benchmark
                and pair["a"] == baseline
                and entry["run_dir"] in (pair["b"], *self.members(pair["b"]))
            ),
            None,
        )

    def accuracy(self, entry: Mapping[str, Any], benchmark: str) -> float | None:
        """Accuracy of a run on a benchmark, 0..1."""
        found = entry["metrics"].get(f"{benchmark}/accuracy")
        return None if found is None else float(found["value"])

    def settings(self) -> list[str]:
        """The settings worth a column: the choices, and what is confounded with them; never the seed."""
        known = [run.config for run in self.runs if run.config and run.is_completed]
        known = known if len(known) > 1 else [run.config for run in self.runs if run.config]
        chosen = choices(known)
        return [key for key in [*chosen, *confounded(known, chosen)] if key != "seed"]

    def value(self, entry: Mapping[str, Any], key: str) -> Any:
        """A setting of a run, from its configuration; None where it has none."""
        run = self.run(entry["run_dir"])
        return run.config.get(key) if run else None

    def told(self, entry: Mapping[str, Any], key: str) -> str:
        """A setting of a run as it is written."""
        run = self.run(entry["run_dir"])
        return "-" if run is None or not run.config else shown(run.config.get(key))

    def letters(self, name: str, benchmark: str) -> str:
        """Letters of the groups that an arm belongs to: those that share one are not told apart."""
        groups = (self.comparison.get("groups") or {}).get(benchmark) or {}
        return str((groups.get("letters") or {}).get(name, ""))

    @property
    def several_seeds(self) -> list[Mapping[str, Any]]:
        """All arms, where some arm has more than one run; else none."""
        arms = list(self._arms().values())
        return arms if any(len(arm["runs"]) > 1 for arm in arms) else []

    def _arms(self) -> dict[str, Mapping[str, Any]]:
        return {arm["id"]: arm for arm in self.comparison.get("arms") or []}


def series(place: int) -> str:
    """The class that gives a run its colour and its dashes, the same in all plots."""
    dashes = place // N_COLOURS % N_DASHES
    return f"s{place % N_COLOURS}" + (f" dash{dashes}" if dashes else "")
