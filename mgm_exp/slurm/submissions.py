"""The journal of what was submitted, so that nothing is submitted twice: whoever dies, and at whatever instant.

Below the sweep's folder:

    .slurm/<id>/submission.json    what one ``sbatch`` call submits: written before the call, and again with the job's
                                   number after it
    .slurm/<id>/job.sh             the script
    .slurm/<id>/lock               locked while ``sbatch`` runs, also when who called it is dead
    .slurm/<id>/started, ended, requeued, stop, collected/<task>    what became of each task; see mgm_exp.slurm.job
    .slurm/code/<hash>/            the code that jobs run from
    <trial>/slurm.json             the latest submission of that run: a job that is not it does nothing

A submission without a number was cut off: the job's own note, or its name in the queue, tells the number. Where neither
is there it never came to be.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgm_exp.store import write_atomic, write_json_atomic

from .commands import Slurm

FOLDER = ".slurm"
LATEST = "slurm.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Task:
    """One run of a submission."""

    run_dir: Path
    overrides: tuple[str, ...]


class Submission:
    """What one ``sbatch`` call submits.

    Args:
        folder: ``<sweep>/.slurm/<id>``.
        content: Of ``submission.json``.
    """

    def __init__(self, folder: Path, content: dict[str, Any]) -> None:
        self.folder = folder
        self.id, self.name = str(content["id"]), str(content["name"])
        self.is_array = bool(content["is_array"])
        self.job: str | None = content["job"]
        self.submitted_at = float(content["submitted_at"])
        self.tasks = [Task(Path(task["run_dir"]), tuple(task["overrides"])) for task in content["tasks"]]
        self._content = content

    @classmethod
    def begin(
        cls, sweep: Path, sweep_name: str, tasks: Sequence[Task], *, is_array: bool, facts: dict[str, Any]
    ) -> Submission:
        """A new one, not journaled yet: see :meth:`write`.

        Args:
            sweep: The sweep's folder.
            facts: What the job needs to know besides (``max_requeues``, ``container``).
        """
        number = uuid.uuid4().hex[:10]
        name = f"{re.sub(r'[^A-Za-z0-9._-]+', '_', sweep_name)[:60]}-{number}"
        content: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "id": number,
            "name": name,
            "job": None,
            "is_array": is_array,
            "submitted_at": time.time(),
            "tasks": [{"run_dir": str(task.run_dir), "overrides": list(task.overrides)} for task in tasks],
            **facts,
        }
        return cls(sweep / FOLDER / number, content)

    @classmethod
    def read(cls, folder: Path) -> Submission | None:
        """None where there is none, or nothing that can be read."""
        try:
            return cls(folder, json.loads((folder / "submission.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def script(self) -> Path:
        """The file that ``sbatch`` is given."""
        return self.folder / "job.sh"

    def write(self, script: str) -> None:
        """Journals it: from now on it is the latest one of its runs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.script, script)
        write_json_atomic(self.folder / "submission.json", self._content)
        for index, task in enumerate(self.tasks):
            task.run_dir.mkdir(parents=True, exist_ok=True)
            write_json_atomic(task.run_dir / LATEST, {"submission": self.id, "index": index})

    def note_number(self, job: str) -> None:
        """Journals the job's number."""
        self.job = self._content["job"] = job
        write_json_atomic(self.folder / "submission.json", self._content)

    @contextmanager
    def sending(self) -> Iterator[int]:
        """A descriptor to hand to ``sbatch``: who looks for this submission waits until it is closed everywhere."""
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with contextlib.suppress(OSError):  # no locks here: a job that is submitted twice does nothing, see LATEST
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def find(self, slurm: Slurm) -> str | None:
        """The job's number, where it was cut off before it was noted; None: it was never submitted.

        Raises:
            SlurmAway: the controller does not answer, so that it is not known.
        """
        if self.job is None:
            with self.sending():
                number = next((note["job_id"].partition("_")[0] for note in self._notes("started")), None)
                number = number or slurm.number_of(self.name)
            if number:
                self.note_number(number)
        return self.job

    def job_of(self, index: int) -> str:
        """The job of a task, as Slurm writes it: ``12``, or ``12_3`` in an array."""
        return f"{self.job}_{index}" if self.is_array else str(self.job)

    def log_of(self, index: int) -> Path:
        """What the job printed: the run's output, or Slurm's own log where it did not come so far."""
        output = self.tasks[index].run_dir / "output.txt"
        return output if self.started(index) else self.folder / f"{self.job_of(index)}.out"

    def started(self, index: int) -> bool:
        """Whether the job has begun."""
        return (self.folder / "started" / f"{index}.json").exists()

    def ended(self) -> set[int]:
        """The tasks that say of themselves that they are over."""
        try:
            return {int(name[:-5]) for name in os.listdir(self.folder / "ended") if name[:-5].isdigit()}
        except FileNotFoundError:
            return set()

    def ending(self, index: int) -> dict[str, Any]:
        """What a task says of its end; empty where it says nothing."""
        return _read(self.folder / "ended" / f"{index}.json")

    def mark(self, what: str, index: int) -> None:
        """Leaves a mark (``stop``, ``collected``) for a task."""
        (self.folder / what).mkdir(exist_ok=True)
        write_atomic(self.folder / what / str(index), "")

    def is_marked(self, what: str, index: int) -> bool:
        """Whether there is such a mark."""
        return (self.folder / what / str(index)).exists()

    def _notes(self, what: str) -> list[dict[str, Any]]:
        return [_read(path) for path in sorted((self.folder / what).glob("*.json"))]


def latest_of(sweep: Path, run_dir: Path) -> tuple[Submission, int] | None:
    """The latest submission of a run, and its task in it."""
    note = _read(run_dir / LATEST)
    if not note:
        return None
    submission = Submission.read(sweep / FOLDER / str(note["submission"]))
    return None if submission is None else (submission, int(note["index"]))


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
