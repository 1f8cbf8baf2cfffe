"""The thread that samples the machine beside training, and hands each sample on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from mgm_exp.monitor.machine import Machine

log = logging.getLogger(__name__)

OnSample = Callable[[dict[str, Any]], None]
# A disk that does not answer must not hold the run's end up.
_PATIENCE_S = 5.0


class Sampler:
    """Takes a sample at once, then every ``every_s`` seconds, and a last one when it is stopped.

    A reading or a listener that fails ends the sampling with one warning: watching never stops what is watched.

    Args:
        machine: What is sampled.
        every_s: Seconds between two samples.
        place: Gives ``stage`` and ``step`` of the run; they are put into each sample.
        listeners: Called with each sample, in the sampler's thread.
    """

    def __init__(
        self,
        machine: Machine,
        every_s: float,
        place: Callable[[], dict[str, Any]],
        listeners: Sequence[OnSample],
    ) -> None:
        self._machine, self._every_s, self._place, self._listeners = machine, every_s, place, listeners
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mgm-exp-monitor", daemon=True)

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def stop(self) -> None:
        """Takes the last sample and ends; a second call does nothing."""
        self._over.set()
        self._thread.join(_PATIENCE_S)

    def _run(self) -> None:
        try:
            self._sample()
            while not self._over.wait(self._every_s):
                self._sample()
            self._sample()
        except Exception as error:  # noqa: BLE001 - readings of a foreign system; the run goes on without them
            log.warning("the machine is no longer sampled (%s: %s); the run goes on", type(error).__name__, error)

    def _sample(self) -> None:
        sample = self._machine.sample(time.time())
        sample = {"t": sample.pop("t"), **self._place(), **sample}
        for listener in self._listeners:
            listener(sample)
