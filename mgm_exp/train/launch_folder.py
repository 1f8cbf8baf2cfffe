"""The files through which a stage's starter, its agents (one a machine) and its processes talk, on a shared folder.

launch/attempt-0/                     one for each start of the processes
    job.json, launch.json             from the starter: the job; where everything runs
    alive                             the start's name and a number that grows while the starter lives
    stop, stacks                      asks the processes to save and end; to write down where they are
    abort                             asks the agents to end them at once
    events.jsonl, answer-<step>       of the first process; the answers to its validation points
    pid-<rank>, pulse-<rank>.json     of each process: where it is in the work
    outcome-<rank>.json               how a process ended, with its traceback
    agent-<machine>.json              how the processes of a machine ended: {rank: exit code}
    logs/rank-<rank>.out, .err        what each one printed; logs/agents.txt: what the agents did
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mgm_exp.store import Lease, lease_of, read_json, write_atomic, write_json_atomic
from mgm_exp.train.job import TrainJob

# How often files are looked at.
POLL_S = 0.1
# What a parent answers to a validation point.
GO_ON, STOP = "go on", "stop"


@dataclass(frozen=True)
class LaunchFacts:
    """What an agent and a process must know to take part.

    Args:
        names: The machines, in order.
        per_machine: Processes on each.
        endpoint: Address and port at which they meet; None: the only agent chooses one.
        run_id: Of this start.
        timeout_s: ``launch.timeout_s``.
        lease, token: The lease that guards the work folder, if it is one of the store's, and its fencing token.
        environment: Variables that the processes need before they import torch.
    """

    names: tuple[str, ...]
    per_machine: int
    endpoint: tuple[str, int] | None
    run_id: str
    timeout_s: float
    lease: str | None = None
    token: int | None = None
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def devices(self) -> int:
        return len(self.names) * self.per_machine

    def place_of(self, rank: int) -> str:
        """``process 3 of 4``, and where it runs if that is not clear."""
        where = f" (on {self.names[rank // self.per_machine]})" if len(self.names) > 1 else ""
        return f"process {rank} of {self.devices}{where}"

    @classmethod
    def read(cls, path: Path) -> LaunchFacts:
        values = read_json(path)
        endpoint = values.pop("endpoint")
        names = tuple(values.pop("names"))
        return cls(names=names, endpoint=(str(endpoint[0]), int(endpoint[1])) if endpoint else None, **values)


class LaunchFolder:
    """See the module."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.job = folder / "job.json"
        self.facts = folder / "launch.json"
        self.alive = folder / "alive"
        self.stop = folder / "stop"
        self.abort = folder / "abort"
        self.stacks = folder / "stacks"
        self.events = folder / "events.jsonl"
        self.logs = folder / "logs"

    @classmethod
    def attempt(cls, work: Path, number: int) -> LaunchFolder:
        return cls(work / "launch" / f"attempt-{number}")

    @classmethod
    def newest(cls, work: Path) -> LaunchFolder:
        """That of the last start in a stage's work folder."""
        numbers = [int(path.name.partition("-")[2]) for path in (work / "launch").glob("attempt-*")]
        return cls.attempt(work, max(numbers))

    def pid(self, rank: int) -> Path:
        return self.folder / f"pid-{rank}"

    def pulse(self, rank: int) -> Path:
        return self.folder / f"pulse-{rank}.json"

    def outcome(self, rank: int) -> Path:
        return self.folder / f"outcome-{rank}.json"

    def agent(self, machine: int) -> Path:
        return self.folder / f"agent-{machine}.json"

    def answer(self, step: int) -> Path:
        return self.folder / f"answer-{step}"

    def log(self, rank: int, stream: str) -> Path:
        return self.logs / f"rank-{rank}.{stream}"

    def begin(self, job: TrainJob, facts: LaunchFacts) -> None:
        """Makes the folder."""
        self.logs.mkdir(parents=True)
        self.job.write_text(job.to_json(), encoding="utf-8")
        write_json_atomic(self.facts, asdict(facts))
        self.events.touch()

    def ask_to_end(self, why: str) -> None:
        """All agents end their processes at once."""
        if not self.abort.exists():
            write_atomic(self.abort, why)

    def read_outcome(self, rank: int) -> dict[str, Any] | None:
        return _json(self.outcome(rank))

    def read_agent(self, machine: int) -> dict[str, Any] | None:
        return _json(self.agent(machine))

    def pids(self) -> dict[int, int]:
        """Rank -> process id of those that have begun."""
        found = {}
        for path in self.folder.glob("pid-*"):
            with contextlib.suppress(FileNotFoundError, ValueError):
                found[int(path.name.partition("-")[2])] = int(path.read_text(encoding="ascii"))
        return found


def guard_of(job: TrainJob) -> tuple[str | None, int | None]:
    """The lease that guards a job's work folder and its token, if the folder is one of the store's."""
    try:
        path = lease_of(job.work)
    except ValueError:
        return None, None
    if not path.is_dir():
        return None, None
    holder = Lease(path).holder()
    return str(path), holder.token if holder is not None and holder.token else None


def _json(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(FileNotFoundError, ValueError):
        return dict(json.loads(path.read_text(encoding="utf-8")))
    return None
