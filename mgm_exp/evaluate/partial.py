"""Answers so far: a file to which whole batches are appended, each sealed with what it belongs to.

The first line says of which model, questions and settings the answers are; each further line holds one batch and a
hash over all of it and the first line. A line that was being written when the process was killed is cut off; a file
that is damaged in any other way, or that belongs to something else, is named and begun anew.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from mgm_exp.store import disk_full_named, fingerprint, write_atomic

log = logging.getLogger(__name__)

PARTIAL = "answers.partial.jsonl"


class PartialAnswers:
    """The answers of one model to one benchmark, batch by batch.

    Args:
        path: The file; made as needed.
        belongs_to: JSON values that say whose answers these are: a file that says anything else is not used.
        questions: Question ids of each batch.

    Example:
        >>> with PartialAnswers(path, {"model": "..."}, [[1, 2], [3]]) as answers:
        ...     if 0 not in answers.batches:
        ...         answers.add(0, ["red", "two"])
    """

    def __init__(self, path: Path, belongs_to: Mapping[str, Any], questions: Sequence[Sequence[int | str]]) -> None:
        self.path, self._questions = Path(path), questions
        self._head = json.loads(json.dumps(dict(belongs_to)))
        self._seal = fingerprint(self._head)
        self.batches: dict[int, list[str]] = {}
        self._file: IO[str] | None = None

    def __enter__(self) -> PartialAnswers:
        self.batches = self._read()
        # Written whole again: appending behind a torn line would damage the next one.
        lines = [json.dumps({"belongs_to": self._head})]
        lines += [self._line(number, answers) for number, answers in self.batches.items()]
        write_atomic(self.path, "".join(f"{line}\n" for line in lines))
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def add(self, number: int, answers: Sequence[str]) -> None:
        """One more batch; a kill after this call loses nothing of it."""
        if self._file is None:
            raise RuntimeError(f"{self.path} is not open.")
        with disk_full_named(self.path):
            self._file.write(f"{self._line(number, answers)}\n")
            self._file.flush()
        self.batches[number] = list(answers)

    def _line(self, number: int, answers: Sequence[str]) -> str:
        row = {"batch": number, "questions": list(self._questions[number]), "answers": list(answers)}
        return json.dumps({**row, "seal": fingerprint([self._seal, row])[:16]}, ensure_ascii=False)

    def _read(self) -> dict[int, list[str]]:
        if not self.path.is_file():
            return {}
        *lines, _torn = self.path.read_bytes().split(b"\n")
        if not lines:
            return {}
        head = _object(lines[0]).get("belongs_to")
        if not isinstance(head, dict):
            return self._begin_anew(1)
        if head != self._head:
            names = sorted(key for key in {*head, *self._head} if head.get(key) != self._head.get(key))
            log.warning("%s is of another evaluation (%s differ): not used", self.path, ", ".join(names))
            return {}
        found: dict[int, list[str]] = {}
        for place, line in enumerate(lines[1:], start=2):
            row = _object(line)
            number, answers = row.get("batch"), row.get("answers")
            if not isinstance(number, int) or not 0 <= number < len(self._questions) or not isinstance(answers, list):
                return self._begin_anew(place)
            if self._line(number, answers).encode() != line:
                return self._begin_anew(place)
            found[number] = answers
        return found

    def _begin_anew(self, line: int) -> dict[int, list[str]]:
        log.warning("%s is damaged in line %d: not used, all its questions are asked again", self.path, line)
        return {}


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:  # also what is no UTF-8
        return {}
    return value if isinstance(value, dict) else {}
