"""Slurm's commands: submit, ask, signal, cancel. One question for all jobs, and an absent controller is no error.

The state of a job is asked of ``squeue`` (the controller knows it first, and for some minutes after the end, with
``--states=all``); of jobs that it has forgotten ``sacct`` is asked, where the cluster has accounting.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mgm_exp.errors import MgmError, MissingDependencyError, UserError

NEEDED = ("sbatch", "squeue", "scancel", "srun", "scontrol")
# States in which a job is over for good; in every other one it runs, waits, or goes back into the queue.
OVER = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED REVOKED TIMEOUT".split()
)
# What the commands say when the controller does not answer, or too late.
_AWAY = (
    "contact slurm controller",
    "timed out",
    "onnection refused",
    "onnect failure",
    "onnection failure",
    "Zero Bytes were transmitted",
    "temporarily unavailable",
    "temporarily unable",
    "shutting down",
    "in standby mode",
)
_UNKNOWN = "Invalid job id"


class SlurmAway(MgmError):
    """The controller does not answer: nothing is known, and nothing is lost by waiting."""


@dataclass(frozen=True)
class JobState:
    """A job as Slurm sees it.

    Args:
        state: In Slurm's words: PENDING, RUNNING, COMPLETED, ...
        reason: Why it waits, or ended so.
        nodes: Where it runs.
    """

    state: str
    reason: str = ""
    nodes: str = ""

    @property
    def is_over(self) -> bool:
        """Whether it has ended and is not put back into the queue."""
        return self.state in OVER

    def __str__(self) -> str:
        detail = self.nodes if self.state == "RUNNING" else "" if self.reason in ("", "None") else self.reason
        return f"{self.state} {detail}".strip()


def check_commands() -> None:
    """Raises MissingDependencyError where this machine has no Slurm."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        raise MissingDependencyError(
            f"hydra/launcher=slurm needs Slurm's commands, and {', '.join(missing)} cannot be found on this machine.",
            advice="Start it where jobs are submitted, or leave hydra/launcher away to run here.",
        )


class Slurm:
    """The cluster, through its commands."""

    def __init__(self) -> None:
        self._has_accounting = shutil.which("sacct") is not None

    def submit(self, script: Path, environment: Mapping[str, str], held_open: Iterable[int] = ()) -> str:
        """Gives a script to ``sbatch``; the job's number.

        Args:
            environment: What the job inherits.
            held_open: File descriptors that live as long as ``sbatch``.

        Raises:
            SlurmAway: no answer; the job may have been taken all the same.
            UserError: Slurm refuses it, with its reason.
        """
        done = _call(["sbatch", "--parsable", str(script)], environment, held_open)
        number = done.stdout.strip().partition(";")[0]
        if done.returncode == 0 and number.isdigit():
            return number
        said = _said(done)
        if _is_away(said):
            raise SlurmAway(said)
        raise UserError(
            f"sbatch refuses the job: {said}",
            advice=f"The script is {script}; its options come from hydra.launcher.* (docs/slurm.md).",
        )

    def states(self, jobs: Iterable[str]) -> dict[str, JobState]:
        """What becomes of these jobs (``12``, or ``12_3`` of an array); those that are not known are left out.

        Raises:
            SlurmAway: the controller does not answer.
        """
        wanted = set(jobs)
        if not wanted:
            return {}
        found = self._queue(f"--jobs={','.join(_numbers(wanted))}")
        known = {job: state for job, (_, state) in found.items() if job in wanted}
        forgotten = wanted - set(known)
        return known | (self._accounted(forgotten) if forgotten else {})

    def number_of(self, name: str) -> str | None:
        """The number of the job (or array) of this name; None where there is none.

        Raises:
            SlurmAway: the controller does not answer.
        """
        found = self._queue(f"--name={name}")
        numbers = {job.partition("_")[0] for job, (job_name, _) in found.items() if job_name == name}
        return max(numbers, key=int, default=None)

    def _queue(self, which: str) -> dict[str, tuple[str, JobState]]:
        """Job -> its name and state, of those that the controller knows."""
        done = _call(["squeue", "--noheader", "--array", "--states=all", "--format=%i|%j|%T|%r|%N", which])
        if done.returncode != 0:
            said = _said(done)
            if _UNKNOWN in said:
                return {}
            raise SlurmAway(said)
        found = {}
        for line in done.stdout.splitlines():
            fields = line.strip().split("|")
            if len(fields) == 5:
                job, name, state, reason, nodes = fields
                found[job] = (name, JobState(state, reason, nodes))
        return found

    def _accounted(self, jobs: set[str]) -> dict[str, JobState]:
        """Of jobs that the controller has forgotten, where the cluster keeps books."""
        if not self._has_accounting:
            return {}
        numbers = ",".join(_numbers(jobs))
        done = _call(["sacct", "--allocations", "--parsable2", "--format=JobID,State,NodeList", f"--jobs={numbers}"])
        if done.returncode != 0:
            self._has_accounting = "disabled" not in done.stderr
            return {}
        return {job: state for job, state in read_accounts(done.stdout).items() if job in jobs}

    def cancel(self, jobs: Iterable[str], *, waiting_only: bool = False) -> None:
        """``scancel``. Raises SlurmAway."""
        self._tell([*(["--state=PENDING"] if waiting_only else []), *sorted(jobs)])

    def ask_to_stop(self, jobs: Iterable[str]) -> None:
        """SIGTERM to the scripts of running jobs, which let their runs save and end in their own time.

        Raises:
            SlurmAway: the controller does not answer.
        """
        self._tell(["--state=RUNNING", "--batch", "--signal=TERM", *sorted(jobs)])

    def _tell(self, arguments: list[str]) -> None:
        done = _call(["scancel", "--quiet", *arguments])
        said = _said(done)
        if done.returncode != 0 and _is_away(said):
            raise SlurmAway(said)


def read_accounts(text: str) -> dict[str, JobState]:
    """What ``sacct --parsable2 --format=JobID,State,NodeList`` says, by job."""
    from submitit.slurm.slurm import SlurmInfoWatcher

    rows = SlurmInfoWatcher(delay_s=600).read_info(text)
    # "CANCELLED by 1000"; a job that was requeued has a line for each start, the last one counts.
    return {
        job: JobState(row["State"].split()[0].rstrip("+"), "", row.get("NodeList", ""))
        for job, row in rows.items()
        if row.get("State")
    }


def _numbers(jobs: Iterable[str]) -> list[str]:
    return sorted({job.partition("_")[0] for job in jobs}, key=int)


def _call(
    command: list[str], environment: Mapping[str, str] | None = None, held_open: Iterable[int] = ()
) -> subprocess.CompletedProcess[str]:
    # A session of its own: Ctrl-C reaches this process, and not the command that is just submitting.
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        env=environment,
        pass_fds=tuple(held_open),
        start_new_session=True,
    )


def _said(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return " ".join(lines) or f"{done.args[0]} ended with exit code {done.returncode}"


def _is_away(said: str) -> bool:
    return any(word in said for word in _AWAY)
