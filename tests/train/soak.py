"""Not a test: trains a stage to its end through one fault after another, and keeps count of what each one cost.

Every attempt runs in a process of its own, forked from a server that has imported everything. The parent draws the
fault and the moment, watches what the attempt promises (checkpoints it has committed), and damages files in between.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mgm_exp.errors import DiskFullError, Interrupted
from mgm_exp.store import newest_whole
from mgm_exp.train import TrainJob, run_stage

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["mgm_exp.train.loop", "mgm_exp.model.adapters", "mgm_exp.data.batches", "peft"])

# What happens to an attempt. `rot`, `cut` and `torn` damage what a kill leaves.
FAULTS = ("kill", "term", "stop", "full", "slow", "clock", "rot", "cut", "torn")
SURVIVED = ("stop", "full", "slow", "clock")  # such an attempt goes on, and is killed some steps later
DISK_FULL, INTERRUPTED, DONE = 3, 4, 0


@dataclass
class Cost:
    """What a soak came to.

    Attributes:
        faults: how often each fault was met.
        attempts: processes started.
        replayed: steps that were computed again, all attempts together.
        full_disks: attempts that ended because the disk was full.
        beyond: steps lost beyond the newest committed checkpoint that was left whole; 0 unless something is broken.
    """

    faults: Counter[str] = field(default_factory=Counter)
    attempts: int = 0
    replayed: int = 0
    full_disks: int = 0
    beyond: int = 0


def soak(job: TrainJob, every: int, *, seed: int, rounds: int, ballast: Path | None) -> Cost:
    """Trains ``job`` to its end through ``rounds`` faults.

    Args:
        every: steps between its checkpoints.
        ballast: a file on the small disk that the job writes to; grown to fill it. None: the disk is not filled.
    """
    draw, cost = random.Random(seed), Cost()
    faults = [fault for fault in FAULTS if fault != "full" or ballast is not None]
    deck: list[str] = []
    committed = reached = 0
    code: int | None = None
    while code != DONE:
        deck = deck or draw.sample(faults, len(faults))
        fault = deck.pop() if cost.attempts < rounds else "none"
        steps = draw.randint(1, 3 * every)
        with _filled(ballast, job) if fault == "full" and ballast else contextlib.nullcontext():
            attempt = _Attempt(job, fault, seed=draw.randrange(2**31))
            code, start, reached_now, promised = attempt.run(fault, steps, draw)
        assert code in (DONE, INTERRUPTED, DISK_FULL, -signal.SIGKILL), (fault, code)
        assert code != DISK_FULL or fault == "full", fault
        cost.full_disks += code == DISK_FULL
        cost.attempts += 1
        cost.faults[fault] += 1
        if start is not None:
            cost.beyond += max(0, committed - start)
            cost.replayed += max(0, reached - start)
        reached = max(reached, reached_now)
        committed = max(committed, promised)
        if code != DONE:
            committed = _damage(job, fault, committed, draw)
    return cost


class _Attempt:
    def __init__(self, job: TrainJob, fault: str, *, seed: int) -> None:
        self.reading, writing = _SERVER.Pipe(duplex=False)
        self.process = _SERVER.Process(target=_train, args=(job, fault, seed, writing))
        self.process.start()
        writing.close()

    def run(self, fault: str, steps: int, draw: random.Random) -> tuple[int, int | None, int, int]:
        """Exit code; the step it began from; the last step it did; the newest checkpoint that it has committed."""
        start, reached, committed, seen = None, 0, 0, 0
        for kind, step in self._said():
            if kind == "resumed":
                start = step
            elif kind == "checkpoint":
                committed = step
            else:
                start, reached, seen = start or 0, step, seen + 1
                if seen == steps:
                    time.sleep(draw.random() * 0.03)  # anywhere in a step or a save
                    self._meet(fault)
                elif seen == 2 * steps and fault in SURVIVED:
                    self._meet("kill")
        self.process.join(120)
        assert self.process.exitcode is not None, f"hung after step {reached} ({fault})"
        return self.process.exitcode, start, reached, committed

    def _meet(self, fault: str) -> None:
        pid = self.process.pid
        assert pid is not None
        with contextlib.suppress(ProcessLookupError):
            if fault == "term":
                os.kill(pid, signal.SIGTERM)
            elif fault == "stop":
                os.kill(pid, signal.SIGSTOP)
                time.sleep(0.2)
                os.kill(pid, signal.SIGCONT)
            elif fault not in ("none", "full", "slow", "clock"):
                os.kill(pid, signal.SIGKILL)

    def _said(self) -> Iterator[tuple[str, int]]:
        with contextlib.suppress(EOFError):
            while True:
                yield self.reading.recv()


def _train(job: TrainJob, fault: str, seed: int, pipe: Connection) -> None:
    if fault == "clock":
        _jumping_clock(random.Random(seed))
    elif fault == "slow":
        _slow_disk()

    def on_row(row: dict[str, Any]) -> None:
        if (event := row.get("event", "step")) in ("step", "resumed"):
            pipe.send((event, row["step"]))

    try:
        run_stage(job, on_row=on_row, on_checkpoint=lambda folder: pipe.send(("checkpoint", _step(folder))))
    except Interrupted:
        os._exit(INTERRUPTED)
    except DiskFullError:
        os._exit(DISK_FULL)
    os._exit(DONE)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _jumping_clock(draw: random.Random) -> None:
    real: Callable[[], float] = time.time
    time.time = lambda: real() + draw.choice((-86400.0, 0.0, 3600.0, 86400.0))


def _slow_disk() -> None:
    real: Callable[[int], None] = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(0.01)
        real(descriptor)

    os.fsync = slow  # type: ignore[assignment]


@contextlib.contextmanager
def _filled(ballast: Path, job: TrainJob) -> Iterator[None]:
    """The disk of ``ballast`` is full but for half of what a checkpoint needs."""
    newest, _ = newest_whole(job.checkpoints) if job.checkpoints.is_dir() else (None, [])
    needed = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file()) if newest else 0
    disk = os.statvfs(ballast.parent)
    size = max(0, disk.f_bavail * disk.f_frsize - needed // 2)
    with open(ballast, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, size))
    try:
        yield
    finally:
        ballast.unlink()


def _damage(job: TrainJob, fault: str, committed: int, draw: random.Random) -> int:
    """Damages what the killed attempt has left; returns the newest checkpoint that may still be counted on."""
    whole = sorted((path for path in job.checkpoints.glob("step-*") if not path.name.endswith(".tmp")), key=_step)
    if fault == "torn" and job.metrics.exists():
        with open(job.metrics, "ab") as file:
            file.write(b'{"step": 99999, "lo')
    if fault not in ("rot", "cut") or len(whole) < 2:
        return committed
    victim = draw.choice(sorted(path for path in whole[-1].rglob("*") if path.is_file()))
    content = bytearray(victim.read_bytes())
    if fault == "cut":
        content = content[: draw.randrange(len(content))]
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    victim.chmod(0o644)
    victim.write_bytes(content)
    return min(committed, _step(whole[-2]))
