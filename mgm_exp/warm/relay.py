"""What a worker prints, on its way to the terminal of the sweep and to the trial's own file.

A worker of which there is only one shows its trial as if it ran in the sweep's process: with a moving bar where the
sweep has a terminal (the worker then prints to a terminal of its own), line by line elsewhere.
"""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import os
import shutil
import struct
import sys
import termios
import tty
from pathlib import Path
from typing import BinaryIO

from mgm_exp.record.log import plain_line

# A line that does not end is written in pieces of so many characters.
_LONGEST = 65536
_SHOW_CURSOR = "\x1b[?25h"


class Wire:
    """One stream of a worker.

    Args:
        name: ``stdout`` or ``stderr`` of :mod:`sys`: where it is shown. It is looked up whenever something is written,
            as ``print`` does.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.is_terminal = _is_terminal(getattr(sys, name))
        if self.is_terminal:
            self._ours, self.theirs = os.openpty()
            tty.setraw(self.theirs)  # what is printed comes as it was written, and nothing is echoed
            self.fit()
        else:
            self._ours, self.theirs = os.pipe()
        os.set_blocking(self._ours, False)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._file: BinaryIO | None = None
        self._line = ""

    def fileno(self) -> int:
        return self._ours

    def hand_over(self) -> None:
        """The worker has its end; ours shows when that is closed."""
        os.close(self.theirs)
        self.theirs = -1

    def fit(self) -> None:
        """Tells the worker's terminal how large ours is."""
        if self.is_terminal:
            size = shutil.get_terminal_size()
            with contextlib.suppress(OSError):
                fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", size.lines, size.columns, 0, 0))

    def write_to(self, path: Path | None) -> None:
        """From now on what comes is added to this file, too; None: to none."""
        self._end_line()
        if self._file is not None:
            self._file.close()
        self._file = None if path is None else open(path, "ab", buffering=0)  # noqa: SIM115 - see close

    def pump(self) -> bool:
        """Passes on what has come; whether more can come."""
        while True:
            try:
                came = os.read(self._ours, 65536)
            except BlockingIOError:
                return True
            except OSError:  # a terminal whose other end is closed
                return False
            if not came:
                return False
            text = self._decoder.decode(came)
            stream = getattr(sys, self._name)
            stream.write(text)
            stream.flush()
            self._note(text)

    def close(self) -> None:
        """Ends it; a bar that a killed worker left behind gives the cursor back."""
        self.pump()
        self.write_to(None)
        if self.is_terminal:
            stream = getattr(sys, self._name)
            stream.write(_SHOW_CURSOR)
            stream.flush()
        os.close(self._ours)
        if self.theirs >= 0:
            os.close(self.theirs)

    def _note(self, text: str) -> None:
        *lines, self._line = (self._line + text).split("\n")
        if len(self._line) > _LONGEST:
            lines, self._line = [*lines, self._line], ""
        for line in lines:
            self._put(line)

    def _end_line(self) -> None:
        line, self._line = self._line, ""
        if plain_line(line):
            self._put(line)

    def _put(self, line: str) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk: what is shown goes on
                self._file.write(f"{plain_line(line)}\n".encode("utf-8", "backslashreplace"))


def _is_terminal(stream: object) -> bool:
    """Whether a stream of ours is a real terminal, with a file descriptor of its own."""
    try:
        return os.isatty(stream.fileno())  # type: ignore[attr-defined]
    except (OSError, ValueError, AttributeError):  # a notebook's, or one that collects text
        return False
