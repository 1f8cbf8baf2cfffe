"""Kills a piece of code at its first, second, third ... change to the disk, until it runs through.

Each point runs in a forked child whose ``os`` functions that change a file system count down and then end the process
on the spot, as ``kill -9`` would: no ``finally``, no flush. A write is also killed half-way.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

KILLED = 77
CHANGES = (
    "write",
    "fsync",
    "replace",
    "rename",
    "unlink",
    "rmdir",
    "mkdir",
    "link",
    "utime",
    "chmod",
    "open",
    "ftruncate",
)


@dataclass(frozen=True)
class Point:
    """One crash: where, what the child had said until then, and whether it ran through instead."""

    number: int
    operation: str
    said: list[str]
    is_last: bool


def _is_change(name: str, args: tuple[object, ...]) -> bool:
    if name != "open":
        return True
    flags = args[1] if len(args) > 1 else 0
    return isinstance(flags, int) and bool(flags & os.O_CREAT)


def crash_points(
    prepare: Callable[[], None], action: Callable[[Callable[[str], None]], None], *, half_writes: bool = False
) -> Iterator[Point]:
    """Runs ``action(say)`` from a freshly prepared state for each point, and yields after each death.

    ``action`` calls ``say("committed 4")`` when something is promised to be on disk.
    """
    number = 0
    while True:
        number += 1
        prepare()
        point = run_to_change(action, number, half_writes=half_writes)
        yield point
        if point.is_last:
            return


def run_to_change(action: Callable[[Callable[[str], None]], None], number: int, *, half_writes: bool = False) -> Point:
    """``action`` in a child that dies at its ``number``-th change."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _in_child(action, number, writing, half_writes)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read().splitlines()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, KILLED), f"crash point {number} ended with {code}:\n" + "\n".join(said)
    operation = said.pop()[1:] if said and said[-1].startswith("@") else ""
    return Point(number, operation, said, is_last=code == 0)


def _in_child(action: Callable[[Callable[[str], None]], None], number: int, pipe: int, half_writes: bool) -> None:
    real_write, real_exit = os.write, os._exit
    left = number

    def wrap(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def change(*args: object, **kwargs: object) -> object:
            nonlocal left
            if _is_change(name, args):
                left -= 1
                if left == 0:
                    if half_writes and name == "write" and isinstance(args[1], (bytes, memoryview)):
                        real_write(args[0], bytes(args[1])[: len(args[1]) // 2])  # type: ignore[arg-type]
                    real_write(pipe, f"@{name}\n".encode())
                    real_exit(KILLED)
            return real(*args, **kwargs)

        return change

    try:
        for name in CHANGES:
            setattr(os, name, wrap(name, getattr(os, name)))
        action(lambda text: real_write(pipe, (text + "\n").encode()))  # type: ignore[func-returns-value, arg-type]
    except BaseException:  # noqa: BLE001 (a forked child must never return into pytest)
        real_write(pipe, traceback.format_exc().encode())
        real_exit(1)
    real_exit(0)


def wait_until(condition: Callable[[], bool], limit_s: float = 20.0) -> None:
    """Returns when ``condition`` holds; fails the test when it does not in time."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def names_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
