"""Processes that work on pieces of data for this one: spawned, deaf to Ctrl-C, and gone when it is."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

from .processes import start_pool_process


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spawned_pool(workers: int) -> ProcessPoolExecutor:
    """A pool whose processes are started when the first work is given to it.

    Args:
        workers: How many. This process decides what a stop signal means for them.
    """
    return ProcessPoolExecutor(
        workers,
        # Not forked: this process may run threads (torch, W&B), and a fork copies their locks.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=start_pool_process,
        initargs=(os.getpid(),),
    )
