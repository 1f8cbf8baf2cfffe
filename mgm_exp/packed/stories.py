"""Several runs told in one process: each prepares by itself, all train together, each is evaluated by itself.

A run that comes to its instruct stage lets the next one begin, inside of its own story; the last one that comes there
has all of them trained, and then the stories end one after another, the last one first. So every run is the ordinary
story of an experiment, in its own folder, under its own leases, and nothing runs beside it.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from mgm_exp.config import CudaGraphs, ExperimentConfig
from mgm_exp.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, Interrupted, MgmError
from mgm_exp.experiment import Company, run_experiment
from mgm_exp.slots import OUTPUT
from mgm_exp.train import run_stage
from mgm_exp.train.pack.compatible import why_alone
from mgm_exp.warm.surroundings import gpu_answers

# Frames of Python that a story takes until the next one begins inside of it, with room.
_DEPTH = 100


@dataclass(frozen=True)
class Run:
    """A composed run, and what it is told of itself; see :func:`mgm_exp.experiment.run_experiment`."""

    config: ExperimentConfig
    run_dir: Path
    command: list[str]
    overrides: list[str]
    sweep: str | None


class Stories:
    """See the module.

    Args:
        runs: Those that train together; a single one trains as it would without all this, but for CUDA graphs.
        ended: Told of each run's exit code as it ends.
        say: Prints a line about all of them.
        width: Trials whose passes are taken together at most; None: all.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        ended: Callable[[Run, int], None],
        say: Callable[[str], None],
        width: int | None = None,
    ) -> None:
        self._waiting, self._ended, self._say, self._width = list(runs), ended, say, width
        self._trials: list[Any] = []
        self._later: list[Run] = []
        self._count = len(runs)
        self._n_ended = 0
        self._is_trained = False
        self.is_stopped = False

    def tell(self) -> None:
        """Runs them to their ends; afterwards :attr:`is_stopped` says whether a signal asked for an early one."""
        before = sys.getrecursionlimit()
        sys.setrecursionlimit(before + _DEPTH * self._count)
        try:
            while self._waiting:
                self._begin()
            self._is_trained = True  # those that come later train by themselves
            self._waiting, self._later = self._later, []
            while self._waiting:
                self._begin()
        finally:
            sys.setrecursionlimit(before)

    def _begin(self) -> None:
        """The next story, from its beginning to its end."""
        run = self._waiting.pop(0)
        code = EXIT_INTERRUPTED
        if not self.is_stopped:
            with printing_to(run.run_dir):
                try:
                    code = self._told(run)
                except _PutOff:
                    self._later.append(run)
                    return
        self.is_stopped |= code == EXIT_INTERRUPTED
        self._ended(run, code)
        self._n_ended += 1
        self._end_if_broken(least=1)

    def _told(self, run: Run) -> int:
        company = Company(lambda job, **listening: self._train(run, job, **listening), self._before_waiting)
        try:
            run_experiment(
                run.config,
                run.run_dir,
                command=run.command,
                overrides=run.overrides,
                sweep=run.sweep,
                company=company,
            )
        except _PutOff:
            raise
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
        except Exception as error:  # noqa: BLE001 - it ends this run; the others go on
            return told_failure(error)
        return EXIT_DONE

    def _train(self, run: Run, job: Any, **listening: Any) -> Any:
        """In place of :func:`mgm_exp.train.run_stage`."""
        is_single = self._count == 1 and run.config.train.cuda_graphs is CudaGraphs.none
        if job.stage != "instruct" or is_single or self._is_trained or why_alone(run.config):
            return run_stage(job, **listening)
        from mgm_exp.train.launch import check_machine, stopped_after_the_end
        from mgm_exp.train.listener import Listener
        from mgm_exp.train.pack.trials import Trial

        check_machine(run.config)
        given = {name: call for name, call in listening.items() if call is not None}
        trial = Trial(job, Listener(**given), _Printing().put_back)
        self._trials.append(trial)
        while self._waiting and not self.is_stopped:
            self._begin()
        if self.is_stopped and not self._is_trained:
            raise Interrupted("Stopped before training began.", advice="The same command continues.")
        if not self._is_trained:
            self._train_all()
        summary = trial.result()
        if self.is_stopped:
            raise stopped_after_the_end(job, "a signal")
        return summary

    def _before_waiting(self, stage: str) -> None:
        """Runs of this pack hold what they make until all are trained: they must not wait for an adapter that another
        process makes, which may wait for one of theirs; nor for one another, where two ask for the same one.

        Raises:
            _PutOff: This run is told when the pack is done.
        """
        if stage == "instruct" and self._trials:
            raise _PutOff("Somebody makes the same adapter already; this run goes on when its pack is done.")

    def _train_all(self) -> None:
        from mgm_exp.train.pack.trials import Pack
        from mgm_exp.train.stop import StopRequest

        self._is_trained = True
        self._say(f"pack: {len(self._trials)} trial(s) train together")
        stop = StopRequest()
        try:
            with stop.listening():
                Pack(self._say, self._width).train(self._trials, stop)
        except Exception as error:  # noqa: BLE001 - of all of them, not of the one whose story is being told
            for trial in self._trials:
                if trial.summary is None and trial.error is None:
                    trial.error = error
        self.is_stopped |= stop.reason is not None
        self._end_if_broken(least=2)

    def _end_if_broken(self, least: int) -> None:
        """Ends this process where its GPU has broken down and so many runs are left: they go on in new ones, in smaller
        packs, and in the end the one that it broke down of is alone with it (:mod:`.slots`)."""
        if self._count - self._n_ended >= least and not gpu_answers():
            self._say("pack: the GPU does not answer this process any more; its runs go on in other processes")
            sys.stdout.flush()
            os._exit(EXIT_FAILED)


def told_failure(error: Exception) -> int:
    """Prints what ended a run; its exit code."""
    if isinstance(error, MgmError):
        print(str(error) if error.exit_code == EXIT_INTERRUPTED else f"error: {error}", flush=True)
        return error.exit_code
    import traceback

    traceback.print_exc()
    print(f"error: the run failed: {type(error).__name__}: {error}", flush=True)
    return EXIT_FAILED


class _PutOff(Interrupted):
    """A run is told later."""


class _Printing:
    """Where is printed to now: to the log of the run whose story is being told."""

    def __init__(self) -> None:
        self._streams = sys.stdout, sys.stderr

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """It is so again, while this is open."""
        before = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = self._streams
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before


@contextmanager
def printing_to(run_dir: Path) -> Iterator[None]:
    """What is printed, also by logging, is added to the run's own file; it does not come to the runs around it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    before = sys.stdout, sys.stderr
    with open(run_dir / OUTPUT, "a", encoding="utf-8", errors="backslashreplace") as file:
        moved = _moved_handlers(before, file)
        sys.stdout = sys.stderr = file
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before
            for handler, stream in moved:
                handler.setStream(stream)


def _moved_handlers(streams: tuple[TextIO, TextIO], to: TextIO) -> list[tuple[Any, Any]]:
    moved = []
    for logger in [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]:
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and vars(handler).get("stream") in streams:
                moved.append((handler, handler.stream))
                handler.setStream(to)
    return moved
