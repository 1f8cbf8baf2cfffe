"""The guesser that never looks: the most frequent training answer to the same question text.

What it scores is what a benchmark gives away without its images. A model that does not beat it has learnt the
questions, not to see.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mgm_exp.errors import DataError
from mgm_exp.evaluate.benchmarks.base import Benchmark

IMAGE_TOKEN = "<image>"


@dataclass(frozen=True)
class Guessed:
    """Score of the guesser.

    Args:
        metrics: As a model's evaluation has them, ``<benchmark>/accuracy`` first.
        n: Questions.
        n_known: Questions whose text occurs in the training rows; the others got the most frequent answer of all.
    """

    metrics: dict[str, float]
    n: int
    n_known: int


def _key(question: str) -> str:
    return " ".join(question.replace(IMAGE_TOKEN, " ").lower().split())


def _counts(rows: Iterable[Mapping[str, Any]]) -> dict[str, Counter[str]]:
    """Answers to each question text of LLaVA rows, every round of a conversation counted."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        asked = None
        for turn in row["conversations"]:
            if turn["from"] == "human":
                asked = _key(turn["value"])
            elif asked is not None:
                counts[asked][turn["value"].strip()] += 1
                asked = None
    return counts


def _most_frequent(answers: Counter[str]) -> str:
    return min(answers, key=lambda answer: (-answers[answer], answer))


def _guesser(counts: Mapping[str, Counter[str]]) -> Callable[[str], str]:
    """Question text -> its most frequent answer; for an unknown one, the most frequent answer of all."""
    everything: Counter[str] = Counter()
    for answers in counts.values():
        everything.update(answers)
    if not everything:
        raise DataError("The question-only baseline has no training answers to guess from: the rows hold none.")
    usual = _most_frequent(everything)
    best = {question: _most_frequent(answers) for question, answers in counts.items()}
    return lambda question: best.get(_key(question), usual)


def score_guesses(benchmark: Benchmark, training_rows: Iterable[Mapping[str, Any]]) -> Guessed:
    """Scores the guesser on a benchmark, with the benchmark's own scorer.

    Args:
        benchmark: Its questions are answered, its images are not opened.
        training_rows: Conversations in LLaVA's form: what the compared models were trained on. Equally frequent
            answers are settled by the alphabet.

    Raises:
        DataError: the rows hold no answer.
    """
    counts = _counts(training_rows)
    guess = _guesser(counts)
    rows = []
    for question in benchmark.questions:
        # Training rows of real data hold the benchmark's prompt; those of the demo the bare question.
        text = question.prompt if _key(question.prompt) in counts else question.question
        prediction = guess(text)
        rows.append(
            {
                "question_id": question.question_id,
                "question_type": question.question_type,
                "prediction": prediction,
                "answers": question.answers,
                "score": benchmark.score(prediction, question),
            }
        )
    known = sum(_key(q.prompt) in counts or _key(q.question) in counts for q in benchmark.questions)
    return Guessed(benchmark.summarise(rows), len(rows), known)
