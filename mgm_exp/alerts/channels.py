"""Where messages go: one thread for each address, so that a slow or dead one holds up neither a run nor the others."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mgm_exp.alerts.messages import Message
from mgm_exp.config import address_name, expanded_address, variables_of

# Seconds that an address has to take a connection, and to answer.
CONNECT_S, ANSWER_S = 5.0, 5.0
# Messages that wait for one address at most; more are left out.
MOST_WAITING = 32
_TYPES = {"critical": "failure", "warning": "warning", "info": "info"}
_OVER = None


def deliver(address: str, message: Message, environ: Mapping[str, str] | None = None) -> str | None:
    """Sends one message, and waits for it.

    Args:
        address: Of ``alerts.urls``.
        environ: Where its variables stand; None: this process's environment.

    Returns:
        Why it was not taken, without any key; None: it was.
    """
    given = os.environ if environ is None else environ
    try:
        url = expanded_address(address, given)
    except KeyError as missing:
        return f"the variable ${missing.args[0]} is not set in the environment"
    import apprise

    # urllib3 says whole addresses where somebody wants every detail (hydra.verbose=true)
    logging.getLogger("urllib3").setLevel(logging.INFO)
    with _words_of("apprise") as words:
        server = apprise.Apprise.instantiate(url)
        if server is None:
            return "it is no address that apprise knows"
        server.socket_connect_timeout = min(CONNECT_S, server.socket_connect_timeout or CONNECT_S)
        server.socket_read_timeout = min(ANSWER_S, server.socket_read_timeout or ANSWER_S)
        with_file = {"attach": [message.file]} if message.file and server.attachment_support else {}
        try:
            # Not by Apprise.notify: its pool of threads would keep a process alive that waits for a server
            kind = _TYPES[message.severity]
            taken = bool(server.notify(title=message.title, body=message.body, notify_type=kind, **with_file))
        except Exception as error:  # noqa: BLE001 - foreign code and foreign servers; said, and nothing else
            words.append(type(error).__name__)
            taken = False
    if taken:
        return None
    why = "; ".join(dict.fromkeys(words)) or "it did not take it"
    for name in sorted(variables_of(address), key=lambda name: -len(given.get(name, ""))):
        why = why.replace(given[name], f"${name}")
    return why[:300]


class _words_of:
    """What a library warns of while it is open, in this thread; nothing of it reaches other logs."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)
        self._words: list[str] = []
        self._thread = threading.get_ident()

    def __enter__(self) -> list[str]:
        self._logger.propagate = False
        self._handler = logging.Handler(logging.WARNING)
        self._handler.emit = self._note  # type: ignore[method-assign]
        self._logger.addHandler(self._handler)
        return self._words

    def __exit__(self, *_: Any) -> None:
        self._logger.removeHandler(self._handler)

    def _note(self, record: logging.LogRecord) -> None:
        if record.thread == self._thread:
            self._words.append(record.getMessage())


class Channels:
    """All addresses of a run.

    Args:
        addresses: ``alerts.urls``.
        say: Takes a sentence about an address that does not take a message; called from other threads.
    """

    def __init__(self, addresses: Sequence[str], say: Callable[[str], None]) -> None:
        self._channels = [_Channel(place, address, say) for place, address in enumerate(addresses)]

    def send(self, message: Message) -> None:
        """Hands a message to every address; waits for none."""
        for channel in self._channels:
            channel.put(message)

    def close(self, wait_s: float) -> bool:
        """No more messages; whether all that waited were sent, or given up, within so many seconds."""
        deadline = time.monotonic() + wait_s
        for channel in self._channels:
            channel.end()
        are_done = [channel.is_done(deadline - time.monotonic()) for channel in self._channels]
        return all(are_done)


class _Channel:
    def __init__(self, place: int, address: str, say: Callable[[str], None]) -> None:
        self._name, self._address, self._say = f"alerts.urls[{place}] ({address_name(address)})", address, say
        self._waiting: queue.Queue[Message | None] = queue.Queue()
        # A daemon: a server that does not answer must not keep a process alive
        self._thread = threading.Thread(target=self._run, name=f"mgm-exp-alerts-{place}", daemon=True)
        self._begun = False

    def put(self, message: Message) -> None:
        if self._waiting.qsize() >= MOST_WAITING:
            self._say(f"{self._name} is too slow: {message.kind} is left out")
            return
        self._waiting.put(message)
        if not self._begun:
            self._begun = True
            self._thread.start()

    def end(self) -> None:
        self._waiting.put(_OVER)

    def is_done(self, wait_s: float) -> bool:
        if self._begun:
            self._thread.join(max(0.0, wait_s))
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (message := self._waiting.get()) is not _OVER:
            try:
                why = deliver(self._address, message)
            except Exception as error:  # noqa: BLE001 - an import that fails, a library that changed: said once
                why = f"{type(error).__name__}"
            if why is not None:
                self._say(f"{self._name} did not take {message.kind}: {why}")
