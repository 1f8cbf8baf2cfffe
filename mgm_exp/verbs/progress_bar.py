"""How far a verb is: a bar on standard error, so that standard output holds nothing but results."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

LINE_EVERY_S = 10.0


@contextmanager
def progress_bar(unit: str | None = None) -> Iterator[Callable[[str, int, int], None]]:
    """Gives a callback ``(what, done, total)`` that moves a bar for each ``what``.

    On a terminal the bar goes away at the end; elsewhere a line is written every ten seconds.

    Args:
        unit: What is counted, for "12.3 questions/s"; None: no rate is shown.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(unit).move
        return
    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    if unit is not None:
        columns.append(TextColumn("{task.fields[rate]}"))
    tasks: dict[str, int] = {}
    rates: dict[str, Rate] = {}
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:

        def move(what: str, done: int, total: int) -> None:
            if what not in tasks:
                rates[what] = Rate(done)
                tasks[what] = progress.add_task(what, total=total, rate="")
            rate = rates[what].at(done)
            said = f"{rate:.1f} {unit}/s" if rate else ""
            progress.update(tasks[what], completed=done, total=max(done, total), rate=said)  # type: ignore[arg-type]

        yield move


class Rate:
    """How many a second, since the first one that was done here (what an earlier call had done does not count)."""

    def __init__(self, done: int, now: float | None = None) -> None:
        self._done, self._since = done, time.monotonic() if now is None else now

    def at(self, done: int, now: float | None = None) -> float:
        """A second; 0 as long as nothing is known."""
        seconds = (time.monotonic() if now is None else now) - self._since
        return (done - self._done) / seconds if seconds > 0 else 0.0


class _Lines:
    """A line now and then, for logs."""

    def __init__(self, unit: str | None) -> None:
        self._unit = unit
        self._next = time.monotonic() + LINE_EVERY_S
        self._rates: dict[str, Rate] = {}

    def move(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        rate = self._rates.setdefault(what, Rate(done, now)).at(done, now)
        if now >= self._next:
            self._next = now + LINE_EVERY_S
            line = f"{what}: {done:,} of about {max(done, total):,}"
            if self._unit is not None and rate:
                left = timedelta(seconds=round(max(0, total - done) / rate))
                line += f", {rate:.1f} {self._unit}/s, {left} to go"
            print(line, file=sys.stderr, flush=True)
