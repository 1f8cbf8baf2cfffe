"""``log.txt``: everything that a run prints, without colours and moving bars, and without secrets."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO, cast

from mgm_exp.record.secrets import redact, redact_text, secret_values

# CSI sequences (colours, cursor), OSC sequences (titles, links), and the other two-character escapes.
_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\^_=>])")


@contextmanager
def log_to(run_dir: Path) -> Iterator[Path]:
    """Copies stdout, stderr and logging to ``log.txt`` in the run folder while the block runs.

    Each line goes out with one ``write`` to a file opened for appending, so that lines of threads and of forked
    workers do not mix and a kill loses none. What programs print by themselves, below Python, is not seen here.

    Yields:
        The path of the log.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "log.txt"
    book = LogFile(path)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    book.line(f"--- {started} {' '.join(redact(list(sys.argv)))}")
    stdout, stderr = sys.stdout, sys.stderr
    tees = {id(stdout): Tee(stdout, book), id(stderr): Tee(stderr, book)}
    moved = _move_handlers({key: cast(TextIO, tee) for key, tee in tees.items()})
    sys.stdout, sys.stderr = cast(TextIO, tees[id(stdout)]), cast(TextIO, tees[id(stderr)])
    try:
        yield path
    finally:
        sys.stdout, sys.stderr = stdout, stderr
        for handler, stream in moved:
            handler.setStream(stream)
        for tee in tees.values():
            tee.end_line()
        book.close()


def _move_handlers(streams: dict[int, TextIO]) -> list[tuple[logging.StreamHandler[Any], Any]]:
    """Points logging handlers that hold one of the old streams to its tee; gives them back with their old stream."""
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    moved = []
    for logger in loggers:
        for handler in getattr(logger, "handlers", ()):
            # A handler that looks sys.stderr up whenever it writes (logging's own last resort) has nothing to be moved.
            is_fixed = isinstance(handler, logging.StreamHandler) and "stream" in vars(handler)
            if is_fixed and id(handler.stream) in streams:
                moved.append((handler, handler.stream))
                handler.setStream(streams[id(handler.stream)])
    return moved


class LogFile:
    """A text file that takes whole lines, each in one system call, and masks the secrets of this process."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self._secrets = secret_values()

    def line(self, text: str) -> None:
        """Writes one line. A log that cannot be written (full disk) is given up: the run needs the space more."""
        if self._descriptor < 0:
            return
        try:
            os.write(self._descriptor, f"{redact_text(text, self._secrets)}\n".encode("utf-8", "backslashreplace"))
        except OSError as error:
            self.close()
            logging.getLogger(__name__).warning("log.txt cannot be written any more (%s); the run goes on", error)

    def close(self) -> None:
        """Ends the log; later lines are dropped."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class Tee(io.TextIOBase):
    """A text stream that writes to the terminal as before, and whole lines to a log.

    While a moving bar is on the screen, ``above`` takes the lines in the terminal's place and puts them above the bar.
    """

    def __init__(self, terminal: TextIO, book: LogFile) -> None:
        self.terminal = terminal
        self.book = book
        self.above: Callable[[str], None] | None = None
        self._own = os.getpid()
        self._is_gone = False
        # Every thread builds its own line: print() writes the text and the line end separately.
        self._parts = threading.local()

    def write(self, text: str) -> int:
        """Passes ``text`` on. Returns its length."""
        above = self.above if os.getpid() == self._own else None
        if above is None:
            self._to_terminal(self.terminal.write, text)
        *lines, rest = (getattr(self._parts, "text", "") + text).split("\n")
        # A carriage return begins the line again: only what stands after the last one remains to be seen.
        self._parts.text = rest[rest.rfind("\r", 0, len(rest) - 1) + 1 :]
        for line in lines:
            if above is not None:
                above(line)
            self.book.line(plain_line(line))
        return len(text)

    def end_line(self) -> None:
        """Logs what this thread printed without a line end."""
        rest = plain_line(getattr(self._parts, "text", ""))
        self._parts.text = ""
        if rest:
            self.book.line(rest)

    def flush(self) -> None:
        """Flushes the terminal; the log has every whole line already."""
        self._to_terminal(self.terminal.flush)

    def _to_terminal(self, call: Callable[..., object], *args: str) -> None:
        """A terminal that went away (closed window, ended ``| head``) is no reason to stop a run: its log goes on."""
        if self._is_gone:
            return
        try:
            call(*args)
        except OSError as error:
            self._is_gone = True
            self.book.line(f"[the terminal went away ({error.strerror}); the run goes on]")

    def isatty(self) -> bool:
        """Whether the terminal behind it is one."""
        return self.terminal.isatty()

    def fileno(self) -> int:
        """The terminal's file descriptor, for child processes."""
        return self.terminal.fileno()

    def writable(self) -> bool:
        """Always true."""
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The terminal's encoding."""
        return self.terminal.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        """What the terminal does with characters it cannot show."""
        return self.terminal.errors

    @property
    def buffer(self) -> Any:
        """The terminal's bytes: what is written there is not logged."""
        return self.terminal.buffer


def plain_line(line: str) -> str:
    """A printed line as a reader would see it: colours and cursor movements gone, overwritten text gone."""
    line = _ANSI.sub("", line).rstrip("\r")
    return line[line.rfind("\r") + 1 :].replace("\x00", "")
