"""What all multiple-choice benchmarks share: how options are asked, and how the chosen one is read from an answer.

Options are read by VLMEvalKit's rules (:func:`mgm_exp.evaluate.metrics.extract_choice`). An answer that they cannot
read is wrong and counted (``unreadable``); with a judge, it is asked about these answers, and about no others.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mgm_exp.evaluate.benchmarks.base import Benchmark, Question, mean
from mgm_exp.evaluate.judge import Verdicts
from mgm_exp.evaluate.metrics import extract_choice

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTER_ONLY = "Answer with the option's letter from the given choices directly."

log = logging.getLogger(__name__)


def lettered(options: Sequence[str]) -> dict[str, str]:
    """Letter -> text.

    Raises:
        ValueError: fewer than two options, or more than there are letters.
    """
    if not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f"{len(options)} options, where 2 to {len(LETTERS)} are possible")
    return dict(zip(LETTERS, options, strict=False))


class MultipleChoice(Benchmark):
    """A benchmark whose answers are letters: ``question.answers`` holds the right one."""

    metric_version = "vlmevalkit-1"

    def score(self, prediction: str, question: Question) -> float:
        """1 where the right option is read, else 0."""
        return float(extract_choice(prediction, question.choices) == question.answers[0])

    def reading(self, prediction: str, question: Question) -> dict[str, Any]:
        """The letter that was read (None: none could be), and what there was to choose from."""
        return {"choice": extract_choice(prediction, question.choices), "options": dict(question.choices)}

    def settle(self, rows: list[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
        """Asks the judge, where there is one, about the answers that the rules could not read."""
        judge = self.settings.judge
        open_rows = [row for row in rows if row.get("choice") is None and self.by_id[row["question_id"]].choices]
        if judge is None or not open_rows:
            return rows
        verdicts = Verdicts(judge, out / "judge.jsonl")
        for done, row in enumerate(open_rows):
            if done % 50 == 0:
                log.info("%s: the judge reads answer %d of %d", self.name, done + 1, len(open_rows))
            question = self.by_id[row["question_id"]]
            row["choice"] = verdicts.choice(question.question, question.choices, row["prediction"])
            row["is_judged"] = True
            if question.answers:
                row["score"] = float(row["choice"] == question.answers[0])
        return rows

    def further(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """``unreadable``: share of answers that no option could be read from; they count as wrong."""
        return {"unreadable": mean(float(row["choice"] is None) for row in rows if "choice" in row)}

    def eval_key(self) -> dict[str, Any]:
        """As any benchmark's; a judge is part of the metric."""
        key = super().eval_key()
        if self.settings.judge is not None:
            key["metric_version"] += f"+judge:{self.settings.judge.model}"
        return key
