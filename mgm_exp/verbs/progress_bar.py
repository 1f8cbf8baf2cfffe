"""How far a verb is: a bar on standard error, so that standard output holds nothing but results."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINE_EVERY_S = 10.0


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Gives a callback ``(what, done, total)`` that moves a bar for each ``what``.

    On a terminal the bar goes away at the end; elsewhere a line is written every ten seconds.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines().move
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    tasks: dict[str, int] = {}
    with Progress(*columns, console=console, transient=True) as progress:

        def move(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done, total=max(done, total))  # type: ignore[arg-type]

        yield move


class _Lines:
    """A line now and then, for logs."""

    def __init__(self) -> None:
        self._next = time.monotonic() + LINE_EVERY_S

    def move(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + LINE_EVERY_S
            print(f"{what}: {done:,} of about {max(done, total):,}", file=sys.stderr, flush=True)
