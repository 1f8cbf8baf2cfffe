"""Turns the signals that ask a run to stop into an exception, so that every stage can leave its state in order.

Training installs handlers of its own while it runs (it finishes the step and saves first); everywhere else the work at
hand is safe to break off, because whatever is written is written whole or not at all.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mgm_exp.errors import EXIT_INTERRUPTED, Interrupted

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# Set in jobs of a batch system: it sends several signals for one request (a warning, the end of the time, a signal to
# each process of the job), and SIGKILL when it has waited long enough. Whoever is saving goes on saving.
ONCE = "MGM_EXP_STOP_ONCE"


def is_asked_once() -> bool:
    """Whether further stop signals mean nothing new; else the second one ends the process at once."""
    return os.environ.get(ONCE) == "1"


def heed_from_the_start() -> None:
    """From now on a stop signal ends this process with 130, as it does later, where handlers that save take over.

    To be called before anything large is imported. An import that is broken off may take an exception for a fault of
    its own, so none is raised: where no other handler is in force there is nothing to put in order.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        os.write(2, f"Stopped by {signal.Signals(number).name}.\n".encode())
        os._exit(EXIT_INTERRUPTED)

    for number in STOP_SIGNALS:
        signal.signal(number, stop)


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Raises :class:`Interrupted` in the main thread on the first stop signal; a second one ends the process at once
    (where :data:`ONCE` is set, it is ignored).

    Outside the main thread (notebooks, servers) Python cannot install handlers: nothing is changed there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        for stop_signal in STOP_SIGNALS:
            signal.signal(stop_signal, signal.SIG_IGN if is_asked_once() else signal.SIG_DFL)
        asked.append(
            Interrupted(
                f"Stopped by {signal.Signals(number).name}; what was finished is saved.",
                advice="The same command continues from there.",
            )
        )
        raise asked[-1]

    asked: list[Interrupted] = []
    previous = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield
    except Exception as error:
        # OmegaConf makes an error of its own of what is raised inside of it, with places of the configuration.
        if asked and error is not asked[-1] and asked[-1].message in str(error):
            raise asked[-1] from None
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
