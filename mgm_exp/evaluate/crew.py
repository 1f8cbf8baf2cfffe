"""Several processes that share the questions of a benchmark, each with its own copy of the model.

They take blocks of neighbouring batches as they become free, so that none is given nothing and none waits for a slower
one; batches are the same as in one process, and so are answers. All files are written by the process that started
them. They end with it, however it ends.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgm_exp.config import ExperimentConfig
from mgm_exp.errors import MgmError, ProcessKilled
from mgm_exp.evaluate.batches import blocks
from mgm_exp.evaluate.passes import OnAnswers, Plan
from mgm_exp.model.resident import let_go
from mgm_exp.store import start_pool_process

if TYPE_CHECKING:
    from mgm_exp.evaluate.benchmarks import Benchmark


@dataclass(frozen=True)
class _Block:
    """What a process is asked to do: batches for each model."""

    todo: list[list[int]]


@dataclass(frozen=True)
class _Task:
    """What the blocks that follow are about."""

    benchmark: Benchmark
    plan: Plan
    weights: list[Path | None]


class Crew:
    """See the module.

    Args:
        config: Describes the base.
        device: ``cpu``, or ``cuda``: process k takes GPU k.
        size: Most processes.
        say: Takes a sentence for the user.
    """

    def __init__(
        self, config: ExperimentConfig, device: str, size: int, say: Callable[[str], None] | None = None
    ) -> None:
        self._config, self._device, self._size, self._say = config, device, size, say
        self._members: list[_Member] = []

    def ask(
        self,
        benchmark: Benchmark,
        plan: Plan,
        weights: Sequence[Path | None],
        todo: Sequence[Sequence[int]],
        on_answers: OnAnswers,
        processes: int,
    ) -> None:
        """As :func:`mgm_exp.evaluate.passes.one_pass`, by at most ``processes`` processes, in any order of batches.

        Raises:
            ProcessKilled: one of them was killed.
            MgmError: as it was raised in one of them.
        """
        wanted = [set(batches) for batches in todo]
        waiting = blocks(sorted(set().union(*wanted)), processes)
        let_go()  # of bases that stay in this process: the others need the memory
        while len(self._members) < min(processes, len(waiting)):
            self._members.append(_Member(self._config, self._device, len(self._members), self._size))
        task = _Task(benchmark, plan, list(weights))
        busy = {member.connection: member for member in self._members[: min(processes, len(waiting))]}

        def give(member: _Member) -> None:
            if not waiting:
                del busy[member.connection]
                return
            block = waiting.pop(0)
            member.send(_Block([[number for number in block if number in batches] for batches in wanted]))

        for member in list(busy.values()):
            member.send(task)
            give(member)
        while busy:
            for connection in wait(list(busy)):
                member = busy[connection]  # type: ignore[index]
                said = member.receive()
                if isinstance(said, BaseException):
                    raise said
                if isinstance(said, str):
                    if self._say is not None:
                        self._say(said)
                elif said is None:
                    give(member)
                else:
                    on_answers(*said)

    def close(self) -> None:
        """Ends the processes; what they were doing is lost, what they had answered is not."""
        for member in self._members:
            member.end()
        self._members = []


class _Member:
    """One process, seen from the one that started it."""

    def __init__(self, config: ExperimentConfig, device: str, rank: int, of: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._rank = rank
        device = f"cuda:{rank}" if device == "cuda" else device
        self._process = context.Process(target=_work, args=(os.getpid(), theirs, config, device, of), daemon=True)
        self._process.start()
        theirs.close()  # so that its end shows here

    def send(self, what: Any) -> None:
        try:
            self.connection.send(what)
        except (BrokenPipeError, ConnectionResetError):
            self._raise_end()

    def receive(self) -> Any:
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            self._raise_end()

    def _raise_end(self) -> None:
        self._process.join(timeout=10)
        code = self._process.exitcode
        how = f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
        raise ProcessKilled(
            f"Evaluation process {self._rank} ended {how} before it had answered.",
            advice="Answers so far are kept: the same command continues. If memory ran out, take fewer processes.",
        )

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()


def _work(parent_pid: int, connection: Connection, config: ExperimentConfig, device: str, of: int) -> None:
    """What a process does: blocks of the task at hand, until it is ended."""
    start_pool_process(parent_pid)
    import torch

    from mgm_exp.evaluate.examiner import Desk

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // of))
    desk = Desk(config, device, connection.send)
    task: _Task | None = None
    while True:
        try:
            said = connection.recv()
        except EOFError:
            return
        if isinstance(said, _Task):
            task = said
            continue
        assert task is not None
        try:
            desk.ask(task.benchmark, task.plan, task.weights, said.todo, _answers_through(connection))
        except MgmError as error:
            connection.send(error)
            return
        connection.send(None)


def _answers_through(connection: Connection) -> OnAnswers:
    def send(model: int, batch: int, answers: list[str]) -> None:
        connection.send((model, batch, answers))

    return send
