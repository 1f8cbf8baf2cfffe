"""One :class:`Recorder` for a run and the :class:`Sink` that every place of record implements.

The files in the run folder are the source of truth; every other sink is a copy for people. So a sink that fails is
switched off with one warning and the run goes on; only the files may stop it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from mgm_exp.config import ExperimentConfig, TrackerMode, plain
from mgm_exp.errors import Interrupted
from mgm_exp.record.config_tree import config_tree
from mgm_exp.record.failure import explain
from mgm_exp.record.log import LogFile, log_to
from mgm_exp.record.secrets import redact

log = logging.getLogger(__name__)

Row = Mapping[str, Any]


@dataclass(frozen=True)
class RunInfo:
    """Who this run is, as a tracker needs to know it. Nothing in it is secret."""

    # Stays the same when the run is resumed in its folder.
    run_id: str
    run_dir: Path
    name: str
    # The sweep's name, or None for a single run.
    group: str | None
    # "trial" of a sweep, or "run".
    job_type: str
    # The command line's overrides.
    tags: tuple[str, ...]
    # Resolved and redacted.
    config: dict[str, Any] = field(default_factory=dict)


class Sink:
    """A place where a run is recorded. Every method is optional."""

    # The run stops when this sink fails.
    essential = False
    # It is started before it is known whether the run is refused, and told of that end, too.
    hears_refusals = False

    def start(self, run: RunInfo) -> None:
        """The run begins, for the first time or again."""

    def stage_started(self, stage: str, total_steps: int, rows: Sequence[Row]) -> None:
        """A trained stage begins or continues.

        Args:
            stage: ``align`` or ``instruct``.
            total_steps: Optimizer steps that the stage has.
            rows: The rows that are valid already: up to the checkpoint on resume, all of them when it was reused.
        """

    def row(self, row: Row) -> None:
        """One optimizer step, or an event (a row with the key ``event``) of the stage that runs."""

    def stage_finished(self, stage: str, summary: Mapping[str, Any], reused: bool) -> None:
        """A trained stage is done; ``reused`` says that it was not paid for here."""

    def progress(self, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` units (images, questions, rows) of ``what`` are finished."""

    def predictions(self, benchmark: str, path: Path, image_root: Path, metrics: Mapping[str, float]) -> None:
        """A benchmark is scored: its predictions lie in ``path``, its images below ``image_root``."""

    def finish(self, result: Mapping[str, Any]) -> None:
        """The run ended, however it did; ``result`` is the content of ``result.json``. Called once."""


class Recorder:
    """Passes what happens in a run to all of its sinks.

    As a context manager it also copies everything that is printed to ``log.txt``. Leaving it without :meth:`finish` (a
    crash outside the story) closes the sinks as failed. Before :meth:`begin` only the files are written, and who
    hears of refusals is told: of a run that is refused its error is shown, and nothing else.
    """

    def __init__(self, sinks: Sequence[Sink], run: RunInfo) -> None:
        self.run = run
        self._sinks = [sink for sink in sinks if sink.essential or sink.hears_refusals]
        self._later = [sink for sink in sinks if sink not in self._sinks]
        self._stack = ExitStack()
        self._finished = False
        self.has_begun = False

    def __enter__(self) -> Recorder:
        self._stack.enter_context(log_to(self.run.run_dir))
        try:
            self._each("start", self.run)
        except BaseException:
            self._stack.close()
            raise
        return self

    def begin(self) -> None:
        """The run was looked at and is not refused: shows its configuration, and starts the sinks that people see."""
        self.has_begun = True
        config_tree(self.run.config)
        self.say(f"run folder: {self.run.run_dir}")
        for sink in self._later:
            self._sinks.append(sink)
            self._call(sink, "start", self.run)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if not self._finished:
                self.finish(_unwritten_result(error))
        finally:
            self._stack.close()

    def say(self, text: str) -> None:
        """Prints a line; it also stands in ``log.txt``."""
        print(text, flush=True)

    def note(self, text: str) -> None:
        """A line for ``log.txt`` alone."""
        book = LogFile(self.run.run_dir / "log.txt")
        book.line(text)
        book.close()

    def stage(self, name: str) -> None:
        """Announces the stage that is looked up or made next."""
        self.say(f"== {name}")

    def stage_started(self, stage: str, total_steps: int, rows: Sequence[Row]) -> None:
        """See :meth:`Sink.stage_started`."""
        self._each("stage_started", stage, total_steps, rows)

    def row(self, row: Row) -> None:
        """See :meth:`Sink.row`."""
        self._each("row", row)

    def stage_finished(self, stage: str, summary: Mapping[str, Any], reused: bool) -> None:
        """See :meth:`Sink.stage_finished`."""
        self._each("stage_finished", stage, summary, reused)

    def progress(self, what: str, done: int, total: int) -> None:
        """See :meth:`Sink.progress`."""
        self._each("progress", what, done, total)

    def predictions(self, benchmark: str, path: Path, image_root: Path, metrics: Mapping[str, float]) -> None:
        """See :meth:`Sink.predictions`."""
        self._each("predictions", benchmark, path, image_root, metrics)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Closes every sink; a second call does nothing."""
        if self._finished:
            return
        self._finished = True
        self._each("finish", result)

    def _each(self, method: str, *args: Any) -> None:
        """Calls all sinks before an essential one's error is raised, so that none misses what happened."""
        failure: Exception | None = None
        for sink in list(self._sinks):
            failure = self._call(sink, method, *args) or failure
        if failure is not None:
            raise failure

    def _call(self, sink: Sink, method: str, *args: Any) -> Exception | None:
        """Calls one sink; the error of an essential one. Another one that fails is switched off."""
        try:
            getattr(sink, method)(*args)
        except Interrupted:
            raise
        except Exception as error:  # noqa: BLE001 - a sink is foreign ground; what happens to it is decided here
            if sink.essential:
                return error
            self._switch_off(sink, method, error)
        return None

    def _switch_off(self, sink: Sink, method: str, error: Exception) -> None:
        self._sinks.remove(sink)
        log.warning(
            "%s failed in %s (%s: %s) and is switched off; the run goes on and its files are complete",
            type(sink).__name__,
            method,
            type(error).__name__,
            error,
        )


def _unwritten_result(error: BaseException | None) -> dict[str, Any]:
    """What sinks are told where there is no ``result.json``: the disk is full, or writing it failed."""
    if error is None or isinstance(error, (Interrupted, KeyboardInterrupt, SystemExit)):
        return {"status": "interrupted", "metrics": {}}
    return {"status": "failed", "metrics": {}, "error": explain(error)}


def describe_run(
    config: Mapping[str, Any], run_dir: Path, *, run_id: str, overrides: Sequence[str], sweep: str | None
) -> RunInfo:
    """What a tracker is told of a run; see :func:`open_recorder` for the arguments, the config being plain here."""
    # With several seeds the folder of a trial holds one run each.
    place = run_dir.name if not run_dir.name.startswith("seed_") else f"{run_dir.parent.name}/{run_dir.name}"
    return RunInfo(
        run_id=run_id,
        run_dir=run_dir,
        name=str(config.get("name")) if sweep is None else f"{sweep}/{place}",
        group=sweep,
        job_type="run" if sweep is None else "trial",
        tags=tuple(str(tag) for tag in redact(list(overrides))),
        config=redact(dict(config)),
    )


def open_recorder(
    config: ExperimentConfig,
    run_dir: Path,
    *,
    run_id: str,
    overrides: Sequence[str],
    sweep: str | None = None,
    further: Sequence[Sink] = (),
) -> Recorder:
    """The recorder of a run: files, progress on the screen and, unless it is disabled, W&B.

    Args:
        config: The run's configuration; ``tracker`` says how W&B is used.
        run_dir: The run folder.
        run_id: The run's name for machines, the same after a resume.
        overrides: What the command line changed: the tags.
        sweep: Name of the sweep: the group.
        further: Sinks that other rooms add.
    """
    from mgm_exp.record.files import FilesSink
    from mgm_exp.record.progress import ProgressSink
    from mgm_exp.record.wandb_sink import WandbSink

    run = describe_run(plain(config), Path(run_dir), run_id=run_id, overrides=overrides, sweep=sweep)
    sinks: list[Sink] = [FilesSink(run.run_dir), ProgressSink()]
    if config.tracker.mode is not TrackerMode.disabled:
        sinks.append(WandbSink(config.tracker))
    return Recorder([*sinks, *further], run)
