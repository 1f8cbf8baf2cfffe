"""What runs left behind, read back: results, configurations, and the score of every question. Never a model.

Nothing in a run folder is trusted to be whole: a run that was killed, that still runs, or whose files were damaged is
listed as such with its cause, and takes part in no comparison.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mgm_exp.compare.predictions import PairingError, Predictions, Progress, read_many, read_predictions
from mgm_exp.errors import UserError
from mgm_exp.store import Lease, read_record, read_yaml

_NOT_COMPARED = ("name", "paths", "tracker", "sweep", "plan", "trial", "hydra")
"""Parts of a configuration that say where a run went, not what it is."""
_NAMED = 3


@dataclass(frozen=True)
class Run:
    """One run folder.

    Args:
        path: The folder.
        name: How it is called in a comparison: the folder as it was given, or below the sweep that was given.
        status: completed, failed, pruned, paused, interrupted or running.
        cause: Why it is not completed; empty for a completed run.
        result, manifest, config: Content of the run's files, empty where they are not there; config is flat
            (``train.lr``).
        params: What its sweep varied, from ``sweep.json``; empty for a single run.
    """

    path: Path
    name: str
    status: str
    cause: str
    result: Mapping[str, Any] = field(repr=False)
    manifest: Mapping[str, Any] = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)
    params: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_completed(self) -> bool:
        return self.status == "completed"

    @property
    def metrics(self) -> dict[str, float]:
        """Finite metrics of ``result.json``."""
        found = self.result.get("metrics") or {}
        return {name: float(value) for name, value in found.items() if _is_finite(value)}

    @property
    def eval_keys(self) -> dict[str, dict[str, Any]]:
        """Evaluation key of each benchmark."""
        return dict(self.result.get("eval_keys") or {})

    @property
    def seed(self) -> Any:
        return self.config.get("seed", self.manifest.get("seed"))

    @property
    def benchmarks(self) -> list[str]:
        """Benchmarks with an accuracy."""
        return [name for name in self.eval_keys if f"{name}/accuracy" in self.metrics]

    @cached_property
    def _read(self) -> dict[str, Predictions | PairingError]:
        return {}

    def predictions_path(self, benchmark: str) -> Path:
        """Where the answers to one benchmark lie."""
        return self.path / "predictions" / f"{benchmark}.jsonl"

    def predictions(self, benchmark: str) -> Predictions:
        """The scores of one benchmark.

        Raises:
            PairingError: the file is missing or damaged, or is not what the accuracy in ``result.json`` comes from.
        """
        if benchmark not in self._read:
            self.keep(benchmark, read_predictions(self.predictions_path(benchmark)))
        found = self._read[benchmark]
        if isinstance(found, PairingError):
            raise found
        return found

    def keep(self, benchmark: str, read: Predictions | PairingError) -> None:
        """Keeps what was read of one benchmark, or why it could not be, once it is held to ``result.json``."""
        stated = self.metrics.get(f"{benchmark}/accuracy")
        if isinstance(read, Predictions) and stated is not None:
            found = float(read.scores.mean())
            if abs(stated - found) > 1e-6:
                read = PairingError(
                    f"{self.name}: {benchmark}/accuracy is {stated:.6f} in result.json, but the mean score of its "
                    f"predictions is {found:.6f}.",
                    advice="One of the two files was changed; run the evaluation again.",
                )
        self._read[benchmark] = read


def read_all(runs: Sequence[Run], workers: int | None = 1, on_progress: Progress | None = None) -> None:
    """Reads the predictions of all completed runs at once: what was asked is kept once for all.

    Args:
        workers: Processes; None: one for each usable core.
    """
    done = [run for run in runs if run.is_completed]
    benchmarks = dict.fromkeys(benchmark for run in done for benchmark in run.benchmarks)
    wanted = [(run, benchmark) for benchmark in benchmarks for run in done if benchmark in run.benchmarks]
    paths = [run.predictions_path(benchmark) for run, benchmark in wanted]
    for (run, benchmark), read in zip(wanted, read_many(paths, workers, on_progress), strict=True):
        run.keep(benchmark, read)


def load_run(folder: Path | str, name: str | None = None, params: Mapping[str, Any] | None = None) -> Run:
    """Reads a run folder, whatever state it is in.

    Args:
        folder: The run folder.
        name: How to call it; None: the path as given.
        params: What its sweep varied.

    Raises:
        UserError: there is nothing of a run in the folder.
    """
    path = Path(folder)
    result, manifest = _json_object(path / "result.json"), _json_object(path / "manifest.json")
    config = _config(path / "config.yaml")
    if params is None and not any((result, manifest, config)):
        raise UserError(
            f"{path} is no run folder: it holds neither result.json nor manifest.json nor config.yaml.",
            advice="Give the folder of a run (outputs/runs/NAME/TIME) or of a sweep (outputs/sweeps/NAME).",
        )
    status, cause = _status(path, result)
    return Run(path, name or str(folder), status, cause, result, manifest, config, dict(params or {}))


def load_runs(paths: Sequence[Path | str]) -> list[Run]:
    """The runs of run folders and sweep folders, in the order given; trials in the order of their numbers.

    Raises:
        UserError: a path is neither, a ``sweep.json`` is damaged, or a folder is given twice.
    """
    runs: list[Run] = []
    for path in paths:
        runs += _trials(Path(path)) if is_sweep(path) else [load_run(path)]
    seen: dict[Path, str] = {}
    for run in runs:
        real = run.path.resolve()
        if real in seen:
            raise UserError(f"{run.name} is given twice (also as {seen[real]}).", advice="Give each run once.")
        seen[real] = run.name
    return runs


def is_sweep(path: Path | str) -> bool:
    """Whether a folder is a sweep's."""
    return (Path(path) / "sweep.json").is_file()


def _trials(folder: Path) -> list[Run]:
    sweep = _json_object(folder / "sweep.json")
    trials = sweep.get("trials")
    if not isinstance(trials, list) or not all(map(_is_trial, trials)):
        raise UserError(
            f"{folder / 'sweep.json'} is damaged: it holds no list of trials.",
            advice="Give the run folders below it, or run the sweep's command again: it rewrites the file.",
        )
    runs = []
    for trial in sorted(trials, key=lambda t: t.get("number", 0)):
        place = str(trial.get("run_dir", trial.get("number")))
        if Path(place).is_absolute() or ".." in Path(place).parts:
            raise UserError(f"{folder / 'sweep.json'}: the trial folder {place!r} lies outside of the sweep.")
        params = trial.get("params") or {}
        seeds = sorted((folder / place).glob("seed_*"))
        for run_dir in seeds or [folder / place]:
            of_seed = {"seed": run_dir.name.removeprefix("seed_")} if seeds else {}
            runs.append(load_run(run_dir, str(run_dir), {**params, **of_seed}))
    return runs


def _is_trial(trial: Any) -> bool:
    return (
        isinstance(trial, dict)
        and isinstance(trial.get("number", 0), int)
        and isinstance(trial.get("params") or {}, dict)
        and "\0" not in str(trial.get("run_dir"))
    )


def _status(path: Path, result: Mapping[str, Any]) -> tuple[str, str]:
    if (path / ".lease").exists() and Lease(path / ".lease").holder() is not None:
        return "running", "a process is working on it"
    status = result.get("status")
    if status is None:
        there = (path / "result.json").exists()
        return "interrupted", "result.json is damaged" if there else "it was killed: there is no result.json"
    error = result.get("error") or {}
    cause = str(error.get("cause") or error.get("message") or "") if isinstance(error, Mapping) else str(error)
    return str(status), "" if status == "completed" else cause


# -- files -------------------------------------------------------------------------------------------------------------


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = read_record(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _config(path: Path) -> dict[str, Any]:
    try:
        content = read_yaml(path)
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    return dict(_flat({key: value for key, value in content.items() if key not in _NOT_COMPARED}))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# -- pairing -----------------------------------------------------------------------------------------------------------


def check_pair(a: Run, b: Run, benchmark: str) -> tuple[Predictions, Predictions]:
    """The scores of two runs on one benchmark, question by question.

    Args:
        a: The baseline.
        b: The candidate.

    Raises:
        PairingError: evaluation keys, questions, prompts or reference answers differ; says which.
    """
    first, second = a.eval_keys.get(benchmark) or {}, b.eval_keys.get(benchmark) or {}
    differing = sorted(key for key in {*first, *second} if first.get(key) != second.get(key))
    if differing:
        named = ", ".join(f"{key} ({_shown(first.get(key))} and {_shown(second.get(key))})" for key in differing)
        raise PairingError(
            f"{a.name} and {b.name} cannot be compared on {benchmark}: their evaluation keys differ in {named}.",
            advice="Evaluate both with the same settings.",
        )
    left, right = a.predictions(benchmark), b.predictions(benchmark)
    mine, theirs = left.questions, right.questions
    if mine is theirs:
        return left, right
    if mine.ids != theirs.ids:
        only_a, only_b = sorted(set(mine.ids) - set(theirs.ids)), sorted(set(theirs.ids) - set(mine.ids))
        raise PairingError(
            f"{a.name} and {b.name} cannot be compared on {benchmark}: they answer different questions: question_id "
            f"{_some(only_a)} only in the first, {_some(only_b)} only in the second.",
            advice="Evaluate both on the same questions.",
        )
    if mine.asked != theirs.asked or mine.images != theirs.images:
        both = zip(mine.ids, mine.asked, theirs.asked, mine.images, theirs.images, strict=True)
        changed = [name for name, p, q, image, other in both if p != q or image != other]
        raise PairingError(
            f"{a.name} and {b.name} cannot be compared on {benchmark}: prompt, image or reference answers differ for "
            f"question_id {_some(changed)}.",
            advice="Evaluate both on the same files.",
        )
    return left, right


def _shown(value: Any) -> str:
    return "missing" if value is None else str(value)


def _some(names: Sequence[str]) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
