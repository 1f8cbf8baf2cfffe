"""Which jobs of a sweep are alive, for ``mgm-exp status``: from the journal and one question to Slurm."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from .commands import JobState, Slurm, SlurmAway
from .submissions import FOLDER, Submission

_ASK_EVERY_S = 10.0
_asked: dict[Path, tuple[float, dict[Path, str]]] = {}


def living_jobs(sweep: Path) -> dict[Path, str]:
    """Run folder -> its job and how that stands (``12_3 RUNNING n1``), of all jobs of a sweep that are not over.

    Slurm is asked once for all of them, and at most every ten seconds. Where it does not answer, or is not there, the
    jobs that the journal has are shown, and why nothing more is known.
    """
    if not (sweep / FOLDER).is_dir():
        return {}
    at, found = _asked.get(sweep, (0.0, {}))
    if not at or time.monotonic() - at > _ASK_EVERY_S:
        found = _ask(sweep.resolve())
        _asked[sweep] = (time.monotonic(), found)
    return found


def _ask(sweep: Path) -> dict[Path, str]:
    jobs: dict[Path, tuple[float, str]] = {}
    for file in (sweep / FOLDER).glob("*/submission.json"):
        submission = Submission.read(file.parent)
        if submission is None or submission.job is None:
            continue
        ended = submission.ended()
        for index, task in enumerate(submission.tasks):
            known_at, _ = jobs.get(task.run_dir, (0.0, ""))
            if index in ended or submission.is_marked("collected", index) or known_at > submission.submitted_at:
                continue
            jobs[task.run_dir] = (submission.submitted_at, submission.job_of(index))
    if not jobs:
        return {}
    if shutil.which("squeue") is None:
        return {run_dir: f"{job} (no Slurm on this machine)" for run_dir, (_, job) in jobs.items()}
    try:
        states = Slurm().states(job for _, job in jobs.values())
    except SlurmAway:
        return {run_dir: f"{job} (Slurm does not answer)" for run_dir, (_, job) in jobs.items()}
    alive = {run_dir: (job, states.get(job, JobState("REVOKED"))) for run_dir, (_, job) in jobs.items()}
    return {run_dir: f"{job} {state}" for run_dir, (job, state) in alive.items() if not state.is_over}
