"""The scores of every question, read back: compact, shared between runs, and in several processes where there is much.

Runs of one sweep answer the same questions. What was asked is kept once for all of them (:class:`Questions`), and a
run adds eight bytes a question; 200 runs of 5,000 questions on three benchmarks take some 30 MB.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mgm_exp.errors import UserError
from mgm_exp.store import parse_record, read_text, spawned_pool, usable_cores

Progress = Callable[[str, int, int], None]

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


def read_predictions(path: Path) -> Predictions:
    """Reads a ``predictions/<benchmark>.jsonl``.

    Raises:
        PairingError: it is missing, empty or damaged, or a question stands in it twice.
    """
    reader = _Reader()
    key, scores = reader.read(path)
    return Predictions(reader.questions[key], scores)


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
    wanted = usable_cores() if workers is None else workers
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
    pool = spawned_pool(min(workers, len(tasks)))
    try:
        yield from pool.map(_read_task, tasks)
    except BrokenProcessPool as error:
        raise UserError(
            "A process that reads predictions was killed, most likely because memory ran out.",
            advice="Compare fewer runs at once, or give --workers 1.",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _read_task(paths: Sequence[Path]) -> _TaskResult:
    """Scores of each file with the digest of its questions, and those questions once."""
    reader = _Reader()
    found: list[PairingError | tuple[str, NDArray[np.float64]]] = []
    for path in paths:
        try:
            found.append(reader.read(path))
        except PairingError as error:
            found.append(error)
    return found, reader.questions


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


# -- one file ----------------------------------------------------------------------------------------------------------

_Row = tuple[str, str, str, str]
"""Question id, image, type, and what was asked, as texts."""
_PREDICTION, _SCORE, _FINGERPRINT = '"prediction": "', '"score": ', '"model_fingerprint": "'
_MOST_FRAMES = 100_000


class _Reader:
    """Reads files of the same questions one after another.

    Runs of a sweep write the same lines but for the prediction, the score and the model's fingerprint. The rest of a
    line (its frame) is parsed once; where it comes again with another plain text and another number in these places,
    it means the same question, and only the number is read. Whatever does not look like that is parsed in full.

    ``questions`` holds what was asked, by its digest.
    """

    def __init__(self) -> None:
        self.questions: dict[str, Questions] = {}
        self._frames: dict[str, _Row] = {}
        self._rows: dict[_Row, _Row] = {}
        self._scores: dict[str, float] = {}
        self._orders: dict[tuple[int, ...], tuple[str, NDArray[np.int64]]] = {}

    def read(self, path: Path) -> tuple[str, NDArray[np.float64]]:
        """Digest of the questions of a file, and the scores ordered by question id."""
        try:
            text = read_text(path)
        except (OSError, ValueError) as error:
            raise PairingError(f"{path} cannot be read: {error}.") from error
        if len(self._frames) > _MOST_FRAMES:
            self._frames.clear()
        rows: list[_Row] = []
        scores: list[float] = []
        for number, line in enumerate(text.split("\n"), 1):
            if not line or line.isspace():
                continue
            found = self._quickly(line)
            if found is None:
                try:
                    found = self._in_full(line)
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise PairingError(
                        f"{path}, line {number} is damaged ({type(error).__name__}: {error})."
                    ) from error
            rows.append(found[0])
            scores.append(found[1])
        key, order = self._known(path, rows)
        return key, np.array(scores, dtype=np.float64)[order]

    def _quickly(self, line: str) -> tuple[_Row, float] | None:
        """The row of a frame that was seen before, and the score; None: parse the line."""
        cut = _cut(line)
        if cut is None:
            return None
        row, score = self._frames.get(cut[0]), self._scores.get(cut[2])
        return None if row is None or score is None else (row, score)

    def _in_full(self, line: str) -> tuple[_Row, float]:
        parsed = parse_record(line)
        score = float(parsed["score"])
        if not 0 <= score <= 1:
            raise ValueError(f"score {score} is not in 0..1")
        asked = f"{parsed.get('prompt_hash')}\0{parsed.get('question')}\0{parsed.get('answers')}"
        texts = (str(parsed["question_id"]), str(parsed["image_id"]), str(parsed.get("question_type")), asked)
        row = self._rows.setdefault(texts, texts)
        cut = _cut(line)
        # Only where the pieces that are cut out are what they seem to be.
        if cut is not None and parsed.get("prediction") == cut[1] and cut[2] == repr(parsed["score"]):
            self._frames[cut[0]] = row
            self._scores[cut[2]] = score
        return row, score

    def _known(self, path: Path, rows: Sequence[_Row]) -> tuple[str, NDArray[np.int64]]:
        """Digest of the questions, and the order that sorts them by their ids."""
        identity = tuple(map(id, rows))  # equal rows are one object
        known = self._orders.get(identity)
        if known is not None:
            return known
        order = np.array(sorted(range(len(rows)), key=lambda place: rows[place][0]), dtype=np.int64)
        ordered = [rows[place] for place in order.tolist()]
        ids = tuple(row[0] for row in ordered)
        if not ids or len(set(ids)) < len(ids):
            raise PairingError(f"{path} {'holds a question twice' if ids else 'is empty'}.")
        whole = "\1".join(["\0".join(row) for row in ordered])
        key = hashlib.blake2b(whole.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        if key not in self.questions:
            self.questions[key] = Questions(
                ids,
                tuple(row[1] for row in ordered),
                tuple(row[2] for row in ordered),
                tuple(_digest(row[3]) for row in ordered),
            )
        self._orders[identity] = (key, order)
        return key, order


def _cut(line: str) -> tuple[str, str, str] | None:
    """A line without its prediction, score and fingerprint; the prediction; the score. None for unusual lines."""
    first = line.find(_PREDICTION)
    if first < 0 or line.count('"score"') != 1 or line.count('"prediction"') != 1:
        return None
    first += len(_PREDICTION)
    last = line.find('"', first)
    prediction = line[first:last]
    score_first = line.find(_SCORE, last)
    if last < 0 or score_first < 0 or "\\" in prediction or not prediction.isprintable():
        return None
    score_first += len(_SCORE)
    score_last = line.find(",", score_first)
    if score_last < 0:
        score_last = len(line) - 1  # the closing brace
    name = line.find(_FINGERPRINT, score_last)
    if name < 0:
        frame = line[:first] + line[last:score_first] + line[score_last:]
    else:
        name += len(_FINGERPRINT)
        end = line.find('"', name)
        if end < 0 or not line[name:end].isalnum():
            return None
        frame = line[:first] + line[last:score_first] + line[score_last:name] + line[end:]
    return frame, prediction, line[score_first:score_last]


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
