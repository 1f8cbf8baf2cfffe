"""MMBench's three accuracies, which are never one column: circular, first pass, and over all rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ROTATION = 1_000_000
"""Rotation k of question i has the index i + k * ROTATION."""


@dataclass(frozen=True)
class CircularRow:
    """One row of a circular evaluation.

    Args:
        index: The row's index in the file.
        choice: The letter that was read from the answer; None: none could be read.
        answer: The right letter.
        n_options: Options of the question.
    """

    index: int
    choice: str | None
    answer: str
    n_options: int

    @property
    def question(self) -> int:
        """Index of the question that this row is a rotation of."""
        return self.index % ROTATION

    @property
    def is_right(self) -> bool:
        return self.choice == self.answer


def circular_hits(rows: Iterable[CircularRow]) -> dict[int, bool]:
    """Question -> whether all its rotations are answered rightly; an unread answer is a wrong one.

    Raises:
        ValueError: a question does not have exactly one row for each of its options.
    """
    groups: dict[int, list[CircularRow]] = defaultdict(list)
    for row in rows:
        groups[row.question].append(row)
    for question, group in groups.items():
        turns = sorted(row.index // ROTATION for row in group)
        if turns != list(range(group[0].n_options)):
            raise ValueError(
                f"question {question} has {group[0].n_options} options, but rows for the rotations {turns}: a circular "
                "score needs one for each option"
            )
    return {question: all(row.is_right for row in group) for question, group in groups.items()}


def circular_accuracy(rows: Sequence[CircularRow]) -> float:
    """Share of questions all of whose rotations are answered rightly.

    Raises:
        ValueError: there is no row, or a rotation is missing.

    Source: Liu et al. 2023 (MMBench); VLMEvalKit ``mcq_circular_eval`` with exact matching.
    """
    return _share(circular_hits(rows).values())


def first_pass_accuracy(rows: Sequence[CircularRow]) -> float:
    """Share of questions whose unrotated row is answered rightly."""
    return _share(row.is_right for row in rows if row.index < ROTATION)


def all_rows_accuracy(rows: Sequence[CircularRow]) -> float:
    """Share of rows that are answered rightly, rotations counted one by one."""
    return _share(row.is_right for row in rows)


def _share(hits: Iterable[bool]) -> float:
    known = list(hits)
    if not known:
        raise ValueError("there is no row to be scored")
    return sum(known) / len(known)
