"""Shows how far a run is: a moving bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from mgm_exp.record.log import Tee
from mgm_exp.record.recorder import Row, Sink

LINE_EVERY_S = 10.0


class ProgressSink(Sink):
    """Stage, loss, speed and time left.

    Args:
        line_every_s: Seconds between two lines where there is no terminal; a log gets them in any case.
    """

    def __init__(self, line_every_s: float = LINE_EVERY_S) -> None:
        self._line_every_s = line_every_s
        self._bar: _Bar | None = None
        self._pace = Pace(0, 0)
        self._what = ""
        self._next_line = 0.0
        self._is_on_terminal = False

    def stage_started(self, stage: str, total_steps: int, rows: Sequence[Row]) -> None:
        """Says where a stage begins again; the bar comes with its first step."""
        self._stop()
        done = max((int(row["step"]) for row in rows if "event" not in row), default=0)
        if 0 < done < total_steps:
            print(f"{stage}: continues at step {done} of {total_steps}", flush=True)
        self._begin(stage, done, total_steps)

    def row(self, row: Row) -> None:
        """Moves on by a step; an event is printed as it is."""
        if "event" in row:
            details = " ".join(f"{key}={value}" for key, value in row.items() if key not in ("event", "stage", "step"))
            print(f"{row.get('stage', '')} step {row.get('step', '?')}: {row['event']} {details}".rstrip(), flush=True)
            return
        facts = f"loss {row['loss']:.4f}" if isinstance(row.get("loss"), (int, float)) else "loss ?"
        speed = row.get("tokens_per_s")
        if isinstance(speed, (int, float)):
            facts += f"  {speed:,.0f} tokens/s"
        self._move(int(row["step"]), facts, "steps")

    def stage_finished(self, stage: str, summary: Mapping[str, Any], reused: bool) -> None:
        """Takes the bar away."""
        self._stop()

    def progress(self, what: str, done: int, total: int) -> None:
        """Moves the bar of ``what``, which begins with its first call."""
        if what != self._what:
            self._stop()
            # What is done by the first call took a time that nobody measured: it does not count for the speed.
            self._begin(what, done, total)
        self._pace.total = max(total, done)
        self._move(done, "", "")
        if done >= total:
            self._stop()

    def finish(self, result: Mapping[str, Any]) -> None:
        """Takes the bar away."""
        self._stop()

    def _begin(self, what: str, done: int, total: int) -> None:
        self._what = what
        self._pace = Pace(done, total)
        self._next_line = 0.0
        self._is_on_terminal = _on_terminal()

    def _move(self, done: int, facts: str, unit: str) -> None:
        self._pace.reach(done)
        now = time.monotonic()
        state = f"{facts}  {self._pace.in_words(unit)}".strip()
        if self._bar is None and self._is_on_terminal:
            self._bar = _Bar(self._what, self._pace.total)
        if self._bar is not None:
            self._bar.move(done, state)
        if now >= self._next_line or done >= self._pace.total:
            self._next_line = now + self._line_every_s
            line = f"{self._what}  {done}/{self._pace.total}  {state}".rstrip()
            if self._bar is None:
                print(line, flush=True)
            elif isinstance(sys.stdout, Tee):
                sys.stdout.book.line(line)

    def _stop(self) -> None:
        bar, self._bar = self._bar, None
        self._what = ""
        if bar is not None:
            bar.stop()


class Pace:
    """Speed and time left, from a smoothed time for one unit; what was done before the start does not count."""

    # Weight of the newest interval: a change of speed shows after some twenty intervals.
    NEWEST = 0.1

    def __init__(self, done: int, total: int) -> None:
        self.done = done
        self.total = total
        self.unit_s: float | None = None
        self._began = self._at = time.monotonic()

    def reach(self, done: int) -> None:
        """``done`` units are finished now."""
        now = time.monotonic()
        if done > self.done:
            unit_s = (now - self._at) / (done - self.done)
            self.unit_s = unit_s if self.unit_s is None else (1 - self.NEWEST) * self.unit_s + self.NEWEST * unit_s
        self.done, self._at = done, now

    def in_words(self, unit: str) -> str:
        """Speed and time left (at the end: time taken) as a reader wants them."""
        if not self.unit_s:
            return ""
        speed = (
            f"{1 / self.unit_s:.1f} {unit}/s".replace(" /s", "/s") if self.unit_s < 1 else f"{self.unit_s:.1f} s each"
        )
        if self.done >= self.total:
            return f"{speed}  took {clock(self._at - self._began)}"
        return f"{speed}  {clock((self.total - self.done) * self.unit_s)} left"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 0:02:05."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class _Bar:
    """A rich bar below everything that is printed while it moves."""

    def __init__(self, what: str, total: int) -> None:
        out = sys.stdout
        self._console = Console(file=out.terminal if isinstance(out, Tee) else None)
        # Tees bring their lines here; without them rich redirects the streams by itself.
        self._tees = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, Tee)]
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            console=self._console,
            redirect_stdout=not self._tees,
            redirect_stderr=not self._tees,
        )
        self._task: TaskID = self._progress.add_task(what, total=total, state="")
        self._progress.start()
        for tee in self._tees:
            tee.above = self._print

    def move(self, done: int, state: str) -> None:
        self._progress.update(self._task, completed=done, state=state)

    def stop(self) -> None:
        for tee in self._tees:
            tee.above = None
        self._progress.stop()

    def _print(self, line: str) -> None:
        self._console.print(Text.from_ansi(line), soft_wrap=True)


def _on_terminal() -> bool:
    """Whether a moving bar can be shown: a terminal that can move its cursor."""
    return Console(file=sys.stdout.terminal if isinstance(sys.stdout, Tee) else None).is_terminal
