"""A request to stop, from a signal, a callback or a file: the step at hand is finished and saved first."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from mgm_exp.errors import EXIT_INTERRUPTED
from mgm_exp.signals import STOP_SIGNALS, is_asked_once


class StopRequest:
    """Remembers that somebody wants this stage to stop.

    The first of SIGINT, SIGTERM, SIGUSR1, SIGUSR2 is remembered; the second ends the process at once (children die with
    it), but not in a job of a batch system (:data:`mgm_exp.signals.ONCE`). Outside the main thread Python cannot
    install handlers: there only the callback and the file count.

    Args:
        should_stop: Asked once a step.
        file: Its existence is a request (how a parent asks its worker processes).
    """

    def __init__(self, should_stop: Callable[[], bool] | None = None, file: Path | None = None) -> None:
        self._should_stop, self._file = should_stop, file
        self.reason: str | None = None

    def is_requested(self) -> bool:
        """Whether to stop; :attr:`reason` says why."""
        if self.reason is None and self._file is not None and self._file.exists():
            self.reason = self._file.read_text(encoding="utf-8") or "a request"
        if self.reason is None and self._should_stop is not None and self._should_stop():
            self.reason = "a request"
        return self.reason is not None

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Catches the signals while it is open; the handlers before are put back."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        previous = {number: signal.signal(number, self._caught) for number in STOP_SIGNALS}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None:
            if is_asked_once():
                return
            os._exit(EXIT_INTERRUPTED)
        self.reason = signal.Signals(number).name
