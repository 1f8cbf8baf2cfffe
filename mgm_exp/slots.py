"""Where the trials of a sweep run: in this process one after another, or several at a time in processes of their own.

A free slot is refilled at once: nobody waits for the slowest of a batch. A child dies with this process (the kernel
sees to it), saves its state when this process is asked to stop, and prints into its own folder.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgm_exp.bootstrap import PARENT
from mgm_exp.errors import ConfigError, Interrupted
from mgm_exp.local import LocalConfig, local_slots
from mgm_exp.memory_use import tree_gib
from mgm_exp.search.outcome import Ending, oom_kills
from mgm_exp.store import LeaseHeld, usable_cores

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn

    from mgm_exp.config import ExperimentConfig

# What a child prints, in its run folder; log.txt holds what the run itself printed.
OUTPUT = "output.txt"
_TAIL = 2000
# What a run is given that shares this machine with others.
ONE_MACHINE = "launch.machines=here"
# Of -1000 to 1000: the kernel ends such processes before others of the same size.
_FIRST_TO_GO = 500


@dataclass(frozen=True)
class Work:
    """One run that a slot is to do.

    Args:
        number: The trial's.
        run_dir: Where it writes.
        overrides: What it runs with; :func:`in_sweep` gives those that every trial has.
    """

    number: int
    run_dir: Path
    overrides: tuple[str, ...]


def in_sweep(number: int, name: str, subdir: str) -> list[str]:
    """What a sweep gives every run: the trial's number, the sweep's name, and its folder relative to the sweep's."""
    return [f"trial={number}", f"sweep.name={_quoted(name)}", f"hydra.sweep.subdir='{subdir}'"]


def run_arguments_of(work: Work) -> list[str]:
    """The arguments with which a run is started in a process of its own."""
    return [*work.overrides, f"hydra.run.dir={_quoted(str(work.run_dir))}", "hydra.mode=RUN"]


class Slots(ABC):
    """Places for trials."""

    size: int
    # Whether runs are processes of this machine, and end with this one.
    are_here = True

    @property
    @abstractmethod
    def busy(self) -> int:
        """Runs that are under way, or have ended without being collected."""

    def has_begun(self, number: int) -> bool:
        """Whether a trial that was started computes already, rather than waiting for its turn elsewhere."""
        return True

    @abstractmethod
    def start(self, work: Work) -> None:
        """Begins a run; a slot must be free."""

    @abstractmethod
    def ended(self, timeout_s: float) -> list[tuple[Work, Ending]]:
        """The runs that have ended; waits for the first one, but no longer than ``timeout_s``."""

    @abstractmethod
    def stop(self) -> list[tuple[Work, Ending]]:
        """Asks all runs to save their state and to end; returns when they have."""

    def may_leave(self) -> bool:
        """Whether the sweep may end now and its runs go on without it (``launch.wait=false``)."""
        return False

    def close(self) -> None:  # noqa: B027 - most keep nothing
        """The sweep is over: what was kept for further runs ends."""


class InProcess(Slots):
    """One slot, in this process: a run has ended when :meth:`start` returns.

    Args:
        launch: Overrides and number -> what Hydra's launcher returned.
        record: Leaves the record of a run that could not leave its own: run folder, error, overrides.
    """

    size = 1

    def __init__(
        self,
        launch: Callable[[list[str], int], JobReturn],
        record: Callable[[Path, BaseException, Sequence[str]], None],
    ) -> None:
        self._launch, self._record = launch, record
        self._ended: list[tuple[Work, Ending]] = []

    @property
    def busy(self) -> int:
        return len(self._ended)

    def start(self, work: Work) -> None:
        """Runs it to its end.

        Raises:
            Interrupted: a signal stopped it, and the sweep with it; the run has saved its state.
        """
        stamp = _stamp(work.run_dir)
        try:
            error = _error_of(self._launch(list(work.overrides), work.number))
        except (KeyboardInterrupt, Interrupted) as stop:
            error = stop
        if isinstance(error, (KeyboardInterrupt, Interrupted)):
            raise Interrupted(f"Stopped in trial {work.number}.", advice="The same command continues.") from error
        if error is not None and not isinstance(error, LeaseHeld) and _stamp(work.run_dir) == stamp:
            self._record(work.run_dir, error, work.overrides)
        self._ended.append((work, Ending()))

    def ended(self, timeout_s: float) -> list[tuple[Work, Ending]]:
        ended, self._ended = self._ended, []
        return ended

    def stop(self) -> list[tuple[Work, Ending]]:
        return self.ended(0)


class ChildProcesses(Slots):
    """Several slots on this machine, a process for each run.

    One that crashes or runs out of memory harms no other: each has a process and a session of its own, and the kernel,
    when memory ends, takes a trial before the sweep (``oom_score_adj``).

    Args:
        places: The GPUs of each slot, as CUDA_VISIBLE_DEVICES names them; an empty list where there are none.
        program: The command line that runs one experiment, without its overrides.
        mem_gb: GiB of host memory that a run may use; None: no limit.
    """

    def __init__(self, places: Sequence[Sequence[str]], program: Sequence[str], mem_gb: float | None = None) -> None:
        self.size, self._places, self._program, self._mem_gb = len(places), places, list(program), mem_gb
        self._running: dict[int, tuple[Work, subprocess.Popen[bytes], int | None]] = {}  # by slot
        self._over: dict[int, float] = {}  # slot -> GiB of a run that was ended for them

    @property
    def busy(self) -> int:
        return len(self._running)

    def start(self, work: Work) -> None:
        slot = next(number for number in range(self.size) if number not in self._running)
        work.run_dir.mkdir(parents=True, exist_ok=True)
        arguments = run_arguments_of(work)
        if self.size > 1:  # a slot is a place on this machine, also in a job that has several
            arguments.append(ONE_MACHINE)
        with open(work.run_dir / OUTPUT, "ab") as output:
            # From the main thread: the kernel watches the thread that made a child. A session of its own: Ctrl-C comes
            # to this process, which asks the children to stop, once.
            process = subprocess.Popen(
                [*self._program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment_of(self._places[slot], self.size)},
                start_new_session=True,
            )
        goes_first(process.pid)
        self._running[slot] = (work, process, oom_kills())

    def ended(self, timeout_s: float) -> list[tuple[Work, Ending]]:
        self._wait(timeout_s)
        self._end_those_above_the_limit()
        found = []
        for slot, (work, process, kills_before) in list(self._running.items()):
            code = process.poll()
            if code is None:
                continue
            del self._running[slot]
            used = self._over.pop(slot, None)
            if used is not None and code != 0:
                found.append((work, Ending(code, over_limit=over_limit(used, self._mem_gb))))
                continue
            kills = oom_kills()
            memory = kills is not None and kills_before is not None and kills > kills_before
            found.append((work, Ending(code, memory, last_words(work.run_dir / OUTPUT))))
        return found

    def _end_those_above_the_limit(self) -> None:
        if self._mem_gb is None:
            return
        for slot, (_, process, _) in self._running.items():
            if slot in self._over or process.poll() is not None:
                continue
            used = tree_gib(process.pid)
            if used > self._mem_gb:
                self._over[slot] = used
                process.kill()  # what it started ends with it

    def _wait(self, timeout_s: float) -> None:
        """Until one of them ends, or ``timeout_s`` has passed."""
        processes = [process for _, process, _ in self._running.values()]
        if timeout_s <= 0 or any(process.poll() is not None for process in processes):
            return
        if not processes or not hasattr(os, "pidfd_open"):
            time.sleep(min(timeout_s, 0.05 if processes else timeout_s))
            return
        descriptors = [os.pidfd_open(process.pid) for process in processes]
        try:
            select.select(descriptors, [], [], timeout_s)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def stop(self) -> list[tuple[Work, Ending]]:
        for _, process, _ in self._running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        found = []
        while self._running:
            found += self.ended(1.0)
        return found


def environment_of(place: Sequence[str], slots: int) -> dict[str, str]:
    """What the environment of a child says: who its parent is, its GPUs, and its share of the cores.

    Args:
        place: Its GPUs, as CUDA_VISIBLE_DEVICES names them.
        slots: How many share this machine.
    """
    variables = {PARENT: str(os.getpid())}
    if "OMP_NUM_THREADS" not in os.environ:
        variables["OMP_NUM_THREADS"] = str(max(1, usable_cores() // slots))
    if place:
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(place)
    return variables


def goes_first(pid: int) -> None:
    """Has the kernel, when memory ends, take this process before the sweep."""
    with contextlib.suppress(OSError):  # it has ended already, or this system has no such thing
        Path(f"/proc/{pid}/oom_score_adj").write_text(str(_FIRST_TO_GO))


def over_limit(used_gib: float, mem_gb: float | None) -> str:
    """Why a run was ended that used too much memory."""
    return f"it used {used_gib:.1f} GiB of host memory, and hydra.launcher.mem_gb={mem_gb or 0:g} allows no more"


def make_slots(
    launcher: Any,
    config: ExperimentConfig,
    program: Sequence[str],
    launch: Callable[[list[str], int], JobReturn],
    record: Callable[[Path, BaseException, Sequence[str]], None],
) -> Slots:
    """The slots of a sweep: those of its launcher where it has its own, else this machine's.

    Args:
        launcher: Hydra's. One of ours offers ``make_slots(config, program) -> Slots``.
        config: Of the sweep.
        program: The command line that runs one experiment, without its overrides; empty where the task is a function
            that only this process has.
        launch, record: See :class:`InProcess`.
    """
    if hasattr(launcher, "make_slots") and program:
        slots: Slots = launcher.make_slots(config, list(program))
        return slots
    refuse_leaving(config)
    if config.sweep.slots in (None, 1) and not config.sweep.isolate:
        return InProcess(launch, record)
    return local_slots(LocalConfig(slots=config.sweep.slots or 1), config, program)


def refuse_leaving(config: ExperimentConfig) -> None:
    """Trials of this machine cannot go on without the sweep.

    Raises:
        ConfigError: ``launch.wait=false`` asks for it.
    """
    if not config.launch.wait:
        raise ConfigError(
            "launch.wait=false needs somebody else who runs the trials: hydra/launcher=slurm.",
            advice="Leave it away: trials of this machine end with the command that started them.",
        )


def own_program(config_dir: str | None = None) -> list[str]:
    """The command line that runs one experiment of this package, in this Python."""
    return [sys.executable, "-m", "mgm_exp", *(["--config-dir", config_dir] if config_dir else [])]


def _error_of(returned: JobReturn) -> BaseException | None:
    """What ended the job; None where it went well."""
    from hydra.core.utils import JobStatus

    value: Any = returned._return_value
    if returned.status != JobStatus.COMPLETED:
        return value if isinstance(value, BaseException) else RuntimeError(f"the job returned {value!r}")
    return getattr(value, "error", None)


def _stamp(run_dir: Path) -> int | None:
    try:
        return (run_dir / "result.json").stat().st_mtime_ns
    except FileNotFoundError:
        return None


def last_words(path: Path) -> str:
    """The error, or the last lines, that a child printed, for a run that left no record."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _TAIL))
            text = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    # Lines with dashes are those of the job that started it.
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("--- ")]
    errors = [line for line in lines if line.startswith("error:")]
    return errors[-1].removeprefix("error:").strip() if errors else " ".join(lines[-3:])


def _quoted(text: str) -> str:
    from mgm_exp.search.space import as_text

    return as_text(text)
