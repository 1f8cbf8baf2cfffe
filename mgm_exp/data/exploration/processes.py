"""Work on pieces of data in several processes, results in the order of the pieces."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from mgm_exp.errors import DataError
from mgm_exp.store import spawned_pool, usable_cores

Piece = TypeVar("Piece")
Result = TypeVar("Result")


class WorkerPool:
    """Processes that are started when the first piece needs them, and end with this one.

    Args:
        workers: How many; None: all usable cores. 1 or less: the work is done in this process.
    """

    def __init__(self, workers: int | None = None) -> None:
        self.workers = usable_cores() if workers is None else workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def map(
        self, work: Callable[[Piece], Result], pieces: Iterable[Piece], *, is_worth_it: bool = True
    ) -> Iterator[Result]:
        """``work(piece)`` of every piece, in order; pieces are read a little ahead of the results.

        Args:
            work: A function of a module, so that other processes find it.
            pieces: What it is given.
            is_worth_it: Whether there is enough work to start processes for.

        Raises:
            DataError: a process was killed.
        """
        if self.workers < 2 or not is_worth_it:
            yield from map(work, pieces)
            return
        pool = self._started()
        ahead: deque[Future[Result]] = deque()
        try:
            for piece in pieces:
                ahead.append(pool.submit(work, piece))
                if len(ahead) > 3 * self.workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                "A process that measures the data was killed, most likely because memory ran out.",
                advice="Run with fewer processes: --workers 1.",
            ) from error

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = spawned_pool(self.workers)
        return self._pool
