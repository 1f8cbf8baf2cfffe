"""The scores of every question, read back: compact, shared between runs, and in several processes where there is much.

Runs of one sweep answer the same questions. What was asked is kept once for all of them (:class:`Questions`), and a
run adds eight bytes a question; 200 runs of 5,000 questions on three benchmarks take some 30 MB.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mgm_exp.errors import UserError

Progress = Callable[[str, int, int], None]

_BLOCK = 1000
"""Lines that are parsed in one go: bounds memory with very many questions."""
_WORTH_IT = 50_000_000
"""Bytes of predictions from which on other processes help: starting one takes about half a second."""
_FILES_A_TASK = 25


class PairingError(UserError):
    """Two results that must not be compared: they do not answer the same questions in the same way."""


@dataclass(frozen=True)
class Questions:
    """What a benchmark asked, ordered by question id.

    Args:
        ids: Question ids as texts, (n,).
        images: Image of each question, (n,).
        types: Type of each question, (n,).
        asked: Digest of each question's prompt and reference answers, (n,).
    """

    ids: tuple[str, ...]
    images: tuple[str, ...]
    types: tuple[str, ...]
    asked: tuple[int, ...] = field(repr=False)

    @cached_property
    def clusters(self) -> NDArray[np.int64]:
        """Number of each question's image, in order of appearance, (n,)."""
        seen: dict[str, int] = {}
        return np.array([seen.setdefault(image, len(seen)) for image in self.images], dtype=np.int64)

    @cached_property
    def n_images(self) -> int:
        return len(set(self.images))

    @property
    def has_shared_images(self) -> bool:
        """Whether some image has several questions, so that questions are not independent."""
        return self.n_images < len(self.images)

    @property
    def shared_clusters(self) -> NDArray[np.int64] | None:
        """:attr:`clusters`, or None where every question has an image of its own."""
        return self.clusters if self.has_shared_images else None


@dataclass(frozen=True)
class Predictions:
    """Scores of one run on one benchmark: 0..1 for each question, (n,)."""

    questions: Questions
    scores: NDArray[np.float64]

    @property
    def ids(self) -> tuple[str, ...]:
        return self.questions.ids


def read_predictions(path: Path, known: dict[str, Questions] | None = None) -> Predictions:
    """Reads a ``predictions/<benchmark>.jsonl``.

    Args:
        path: The file.
        known: Questions that were read before, by their digest: they are shared, and new ones are added.

    Raises:
        PairingError: it is missing, empty or damaged, or a question stands in it twice.
    """
    key, questions, scores = _read(path, {} if known is None else known)
    if known is not None:
        known[key] = questions
    return Predictions(questions, scores)


def read_many(
    paths: Sequence[Path], workers: int | None = 1, on_progress: Progress | None = None
) -> list[Predictions | PairingError]:
    """Reads files of predictions; what is wrong with one stands in its place.

    Args:
        paths: The files; those of one benchmark next to each other are read fastest.
        workers: Processes; None: one for each usable core. More than one only where there is enough to read.
        on_progress: Called with what is done, how many files are, and how many there are.

    Raises:
        UserError: a process was killed.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = cores if workers is None else workers
    tasks = [list(paths[first : first + _FILES_A_TASK]) for first in range(0, len(paths), _FILES_A_TASK)]
    is_worth_it = wanted > 1 and len(tasks) > 1 and sum(map(_size, paths)) >= _WORTH_IT
    known: dict[str, Questions] = {}
    found: list[Predictions | PairingError] = []
    for scores, new in _in_processes(tasks, wanted) if is_worth_it else map(_read_task, tasks):
        for key, questions in new.items():
            known.setdefault(key, questions)
        found += [one if isinstance(one, PairingError) else Predictions(known[one[0]], one[1]) for one in scores]
        if on_progress is not None:
            on_progress("reading predictions", len(found), len(paths))
    return found


_TaskResult = tuple[list["PairingError | tuple[str, NDArray[np.float64]]"], dict[str, Questions]]


def _in_processes(tasks: Sequence[list[Path]], workers: int) -> Iterator[_TaskResult]:
    # Not forked: this process may run threads, and a fork copies their locks.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, _start_process, (os.getpid(),))
    try:
        yield from pool.map(_read_task, tasks)
    except BrokenProcessPool as error:
        raise UserError(
            "A process that reads predictions was killed, most likely because memory ran out.",
            advice="Compare fewer runs at once, or give --workers 1.",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_process(parent_pid: int) -> None:
    from mgm_exp.store import die_with_parent

    # The parent decides what a stop signal means; its children end with it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(parent_pid=parent_pid)


def _read_task(paths: Sequence[Path]) -> _TaskResult:
    """Scores of each file with the digest of its questions, and those questions once."""
    known: dict[str, Questions] = {}
    found: list[PairingError | tuple[str, NDArray[np.float64]]] = []
    for path in paths:
        try:
            key, known_questions, scores = _read(path, known)
        except PairingError as error:
            found.append(error)
            continue
        known[key] = known_questions
        found.append((key, scores))
    return found, known


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


# -- one file ----------------------------------------------------------------------------------------------------------

_Row = tuple[str, str, str, str, float]


def _read(path: Path, known: dict[str, Questions]) -> tuple[str, Questions, NDArray[np.float64]]:
    """Digest of the questions, the questions (those in ``known`` if they are there), the scores."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PairingError(f"{path} cannot be read: {error}.") from error
    lines = text.split("\n")
    rows: list[_Row] = []
    for first in range(0, len(lines), _BLOCK):
        rows += _block(path, lines[first : first + _BLOCK], first + 1)
    rows.sort(key=lambda row: row[0])
    ids = tuple(row[0] for row in rows)
    if not rows or len(set(ids)) < len(ids):
        raise PairingError(f"{path} {'holds a question twice' if rows else 'is empty'}.")
    whole = "\1".join(["\0".join(row[:4]) for row in rows])
    key = hashlib.blake2b(whole.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    questions = known.get(key) or Questions(
        ids,
        tuple(row[1] for row in rows),
        tuple(row[2] for row in rows),
        tuple(_digest(row[3]) for row in rows),
    )
    return key, questions, np.array([row[4] for row in rows], dtype=np.float64)


def _block(path: Path, lines: Sequence[str], first: int) -> list[_Row]:
    """The rows of some lines, parsed in one go; line by line where that fails, to name the line."""
    filled = [line for line in lines if line and not line.isspace()]
    try:
        parsed = json.loads(f"[{','.join(filled)}]")
        if len(parsed) == len(filled):
            return [_row(row) for row in parsed]
    except (ValueError, KeyError, TypeError, RecursionError):
        pass  # one of the lines is damaged: below it is found
    rows = []
    for number, line in enumerate(lines, first):
        if not line.strip():
            continue
        try:
            rows.append(_row(json.loads(line)))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise PairingError(f"{path}, line {number} is damaged ({type(error).__name__}: {error}).") from error
    return rows


def _row(row: dict[str, Any]) -> _Row:
    score = float(row["score"])
    if not 0 <= score <= 1:
        raise ValueError(f"score {score} is not in 0..1")
    asked = f"{row.get('prompt_hash')}\0{row.get('question')}\0{row.get('answers')}"
    return str(row["question_id"]), str(row["image_id"]), str(row.get("question_type")), asked, score


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
