"""Answers as classes: what yes and no mean to each benchmark's own scorer, and precision, recall, F1, confusion."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

NEITHER = "neither"


def pope_yes_no(text: str) -> str:
    """POPE's reading of an answer: "no" if its first sentence holds the word No, no or not, else "yes".

    Whatever is neither counts as "yes" there: an answer off the point looks like a hallucination.

    Source: RUCAIBox/POPE and LLaVA, ``eval_pope.py``.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def mme_yes_no(text: str) -> str:
    """MME's reading of an answer: "yes" or "no" within its first four characters, else :data:`NEITHER`.

    Source: lmms-eval ``mme/utils.py`` after MME's ``calculation.py``.
    """
    answer = text.lower().strip().replace(".", "")
    if answer in ("y", "n"):
        return "yes" if answer == "y" else "no"
    start = answer[:4] if len(answer) > 1 else ""
    return next((word for word in ("yes", "no") if word in start), NEITHER)


@dataclass(frozen=True)
class ClassScores:
    """Precision, recall and F1 of one class, in 0..1, and how often it was wanted.

    A share of nothing (no such answer was given, or wanted) is 0.
    """

    precision: float
    recall: float
    f1: float
    support: int


def confusion_matrix(predicted: Sequence[str], wanted: Sequence[str]) -> dict[tuple[str, str], int]:
    """(wanted, predicted) -> how often.

    Raises:
        ValueError: the lists are not equally long.
    """
    if len(predicted) != len(wanted):
        raise ValueError(f"{len(predicted)} predictions for {len(wanted)} answers: a class is needed for each")
    return dict(Counter(zip(wanted, predicted, strict=True)))


def class_scores(predicted: Sequence[str], wanted: Sequence[str]) -> dict[str, ClassScores]:
    """Scores of every class that is wanted somewhere, in alphabetical order."""
    matrix = confusion_matrix(predicted, wanted)
    return {name: _scores_of(name, matrix) for name in sorted(set(wanted))}


def macro_f1(predicted: Sequence[str], wanted: Sequence[str]) -> float:
    """Mean F1 of the classes that are wanted somewhere.

    Raises:
        ValueError: there is no answer.
    """
    scores = class_scores(predicted, wanted)
    if not scores:
        raise ValueError("there is no answer to be scored")
    return sum(one.f1 for one in scores.values()) / len(scores)


def _scores_of(name: str, matrix: Mapping[tuple[str, str], int]) -> ClassScores:
    right = matrix.get((name, name), 0)
    given = sum(n for (_, predicted), n in matrix.items() if predicted == name)
    support = sum(n for (wanted, _), n in matrix.items() if wanted == name)
    return ClassScores(
        precision=right / given if given else 0.0,
        recall=right / support if support else 0.0,
        f1=2 * right / (given + support) if given + support else 0.0,
        support=support,
    )
