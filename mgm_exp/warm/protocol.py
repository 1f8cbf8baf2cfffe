"""What a sweep and its workers say to each other: lines of JSON over a socket that the worker inherits.

    sweep  -> worker   {"runs": [{"number": 3, "output": "/.../3/output.txt", "arguments": ["adapter.rank=8", ...]}],
                        "may_grow_gib": 2.0}
    worker -> sweep    {"rest": {"is_first": true, ...}}    once, before its first run
                       {"number": 3, "exit_code": 0}        a run has ended, with the exit code of its command line
                       {"rest": {...}}                      all of the order have ended, and the worker is free again

An order may hold several runs: a worker does them in turn, unless it is one that knows how to do them together. A
worker that is to end finds the socket closed.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Run:
    """One run of an order.

    Args:
        number: The trial's.
        output: File that what is printed is added to; None: it goes to where the worker prints.
        arguments: Of its command line, as a process of its own would be given them.
    """

    number: int
    output: str | None
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Order:
    """What a worker is to do next.

    Args:
        may_grow_gib: Host memory that it may hold afterwards beyond what it began with; None: no limit. Much less than
            that of freed memory stays with it: asking the kernel for it again costs time.
    """

    runs: tuple[Run, ...]
    may_grow_gib: float | None = None


@dataclass(frozen=True)
class Answer:
    """How a run ended."""

    number: int
    exit_code: int


@dataclass(frozen=True)
class Rest:
    """A worker that waits for its next order, and what it holds meanwhile.

    Args:
        host_gib, gpu_gib: Memory of the process, and what torch has allocated on the GPU, in GiB, without what is kept
            for later runs on purpose.
        says: Sentences for the user.
        is_first: Before the first order.
    """

    host_gib: float
    gpu_gib: float
    says: tuple[str, ...] = ()
    is_first: bool = False


class Channel:
    """One end of the socket."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._rest = b""

    def fileno(self) -> int:
        return self._end.fileno()

    def send(self, what: Order | Answer | Rest) -> None:
        """One line.

        Raises:
            OSError: the other end is closed.
        """
        self._end.sendall(json.dumps(_plain(what)).encode() + b"\n")

    def receive(self) -> Iterator[Order | Answer | Rest]:
        """What has come; waits for the first line, unless the socket does not block.

        Raises:
            EOFError: the other end is closed, and all that it said was given before.
        """
        while True:
            try:
                came = self._end.recv(65536)
            except BlockingIOError:
                return
            except ConnectionResetError:
                came = b""
            if not came:
                raise EOFError
            *lines, self._rest = (self._rest + came).split(b"\n")
            yield from (_parsed(json.loads(line)) for line in lines)
            if lines and not self._rest:
                return

    def close(self) -> None:
        self._end.close()


def _plain(what: Order | Answer | Rest) -> dict[str, Any]:
    return {"rest": asdict(what)} if isinstance(what, Rest) else asdict(what)


def _parsed(line: dict[str, Any]) -> Order | Answer | Rest:
    if "rest" in line:
        return Rest(**{**line["rest"], "says": tuple(line["rest"]["says"])})
    if "runs" in line:
        runs = tuple(Run(run["number"], run["output"], tuple(run["arguments"])) for run in line["runs"])
        return Order(runs, line["may_grow_gib"])
    return Answer(**line)
