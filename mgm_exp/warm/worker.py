"""The worker's side: takes orders, runs each run as a process of its own would, says how it ended, and stays."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from mgm_exp import bootstrap
from mgm_exp.errors import EXIT_FAILED
from mgm_exp.memory_use import own_gib
from mgm_exp.warm.protocol import Answer, Channel, Order, Rest, Run
from mgm_exp.warm.surroundings import Surroundings, gpu_answers

Body = Callable[[list[str]], int]
"""Arguments of a command line -> its exit code."""

# Of what a worker may hold: above it, freed memory goes back to the kernel.
_MUCH = 0.5


def inherited_channel() -> Channel | None:
    """The socket to the sweep that started this process as its worker; None: it is no worker."""
    number = os.environ.pop(bootstrap.WARM, "")
    if not number.isdigit():
        return None
    descriptor = int(number)
    os.set_inheritable(descriptor, False)  # not for processes that a run starts
    return Channel(socket.socket(fileno=descriptor))


def serve(channel: Channel, body: Body, *, loads_torch: bool = True) -> int:
    """Does what comes, until the sweep closes the socket; the exit code of the worker.

    Args:
        channel: To the sweep.
        body: Runs one command line and gives its exit code; raises nothing that a process would survive.
        loads_torch: Whether the runs will load torch, and what else an experiment takes: that is then loaded, and
            torch's state taken down, before the first one.
    """
    from mgm_exp.evaluate.heap import keep_freed_memory
    from mgm_exp.warm.imports import load, seldom_collected
    from mgm_exp.warm.kept import keep

    keep()
    bootstrap.plugins()  # before torch is loaded
    surroundings = Surroundings()
    if loads_torch:
        with seldom_collected():
            surroundings.look()
            load()
        keep_freed_memory()  # evaluation does in any case; :func:`rest` gives it back
    try:
        began = rest()
        channel.send(replace(began, is_first=True))
        while True:
            for order in channel.receive():
                assert isinstance(order, Order)
                for run in order.runs:
                    code = one_run(run, body, surroundings)
                    channel.send(Answer(run.number, code))
                    if not gpu_answers():  # the next run gets a new worker
                        return EXIT_FAILED
                channel.send(rest(began, order.may_grow_gib))
    except (EOFError, BrokenPipeError):
        return 0


def one_run(run: Run, body: Body, surroundings: Surroundings) -> int:
    """One run; its exit code."""
    from mgm_exp.warm.kept import check

    with _printing_to(run.output):
        try:
            with surroundings.of_a_run(list(run.arguments)):
                return body(list(run.arguments))
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:  # noqa: BLE001 - what would have ended its own process ends the run
            traceback.print_exc()
            return EXIT_FAILED
        finally:
            if gpu_answers():
                surroundings.tidy(is_less_kept=check())
            _flush()


def rest(began: Rest | None = None, may_grow_gib: float | None = None) -> Rest:
    """What the worker holds between two orders; if it is much, after it has let go of what it can.

    Args:
        began: What it held at first; None: this is that.
        may_grow_gib: What it may hold beyond that, in GiB; None: no limit.
    """
    from mgm_exp.warm.kept import said

    host, gpu = _held()
    limit = math.inf if may_grow_gib is None else may_grow_gib
    if began is None or host - began.host_gib > _MUCH * limit:
        with contextlib.suppress(OSError, AttributeError):  # a C library without it
            ctypes.CDLL(None).malloc_trim(0)
        host, gpu = _held()
    return Rest(host, gpu, tuple(said()))


def _held() -> tuple[float, float]:
    """GiB of the host and of GPUs, without what is kept on purpose."""
    from mgm_exp.warm.kept import kept_gib

    host, gpu = kept_gib()
    return max(0.0, own_gib(os.getpid()) - host), max(0.0, _gpu_gib() - gpu)


def _gpu_gib() -> float:
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0.0
    return sum(torch.cuda.memory_allocated(number) for number in range(torch.cuda.device_count())) / 2**30


@contextlib.contextmanager
def _printing_to(output: str | None) -> Iterator[None]:
    """All that is printed, also below Python and by children, is added to a file."""
    if output is not None:
        _flush()
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        os.close(descriptor)
    yield


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a full disk, a terminal that is gone
            stream.flush()
