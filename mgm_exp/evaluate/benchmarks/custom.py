"""Questions of your own: one JSON object a line, scored by any metric by its name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mgm_exp.errors import DataError
from mgm_exp.evaluate.benchmarks.base import Question, Settings, Source, Submission, mean, refuse
from mgm_exp.evaluate.benchmarks.multiple_choice import MultipleChoice, lettered
from mgm_exp.evaluate.classification import NEITHER
from mgm_exp.evaluate.metrics import (
    anls,
    bleu4,
    caption_tokens,
    cider,
    class_scores,
    confusion_matrix,
    exact_match,
    extract_choice,
    macro_f1,
    rouge_l,
    textvqa_accuracy,
    token_f1,
    vqa_accuracy,
)
from mgm_exp.evaluate.readers import read_json_lines

Score = Callable[[str, Question], float]

_BY_ANSWERS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "token_f1": token_f1,
    "anls": anls,
    "vqa_accuracy": vqa_accuracy,
    "textvqa_accuracy": textvqa_accuracy,
}
_OF_CORPUS: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]]], float]] = {"cider": cider, "bleu4": bleu4}
_MOST_LABELS = 50


class Custom(MultipleChoice):
    """A user's questions.

    Args:
        questions: JSONL. Each line: ``image``, ``question`` and, where they are to be scored, ``answer`` or
            ``answers``. Optional: ``question_id`` (else the line number), ``image_id``, ``type``, ``choices`` (a list,
            or letter -> text; the answer is then a letter or a choice).
        image_root: Folder that the image paths are relative to.
        metrics: Names; the first one scores an answer.
        instruction: Put below each question.
        settings: Batch size and limits.
    """

    name, split = "custom", "custom"
    sources = (
        Source("questions", "file", "your JSONL file"),
        Source("images", "folder", "your folder of images", is_needed=False),
    )

    def __init__(
        self, questions: Path, image_root: Path, metrics: Sequence[str], instruction: str | None, settings: Settings
    ) -> None:
        super().__init__(image_root, settings)
        self.question_file, self.metrics, self.instruction = Path(questions), tuple(metrics), instruction
        self.split = self.question_file.stem
        self.metric_version = f"{self.metrics[0]}-1"
        self._labels: dict[str, str] = {}

    @classmethod
    def configured(cls, name: str, section: Any, settings: Settings, cache: Path) -> Custom:
        questions = Path(section.questions)
        images = Path(section.images) if section.images else questions.parent
        return cls(questions, images, section.metrics, section.instruction, settings)

    def read(self) -> list[Question]:
        """Questions in the order of the file."""
        questions, faults = [], []
        for number, row in read_json_lines(self.question_file):
            try:
                questions.append(self._question(number, row))
            except (ValueError, TypeError) as error:
                faults.append(f"line {number}: {error}")
        n_scored = sum(bool(question.answers) for question in questions)
        if 0 < n_scored < len(questions):
            faults.append(f"{len(questions) - n_scored} of {len(questions)} questions have no answer: all, or none")
        refuse(
            faults, f"custom: lines of {self.question_file} that cannot be used:", "docs/evaluation.md has the form."
        )
        if {"label", "macro_f1"} & set(self.metrics):
            self._labels = {_plain(answer): answer for question in questions for answer in question.answers}
            if len(self._labels) > _MOST_LABELS:
                raise DataError(
                    f"custom: {len(self._labels)} different answers are too many for the metrics label and macro_f1 "
                    f"(at most {_MOST_LABELS} classes).",
                    advice="Use exact_match.",
                )
        return questions

    def _question(self, number: int, row: Mapping[str, Any]) -> Question:
        for key in ("image", "question"):
            if not isinstance(row.get(key), str) or not row[key]:
                raise ValueError(f"{key} must be a text")
        given = row.get("answers", row.get("answer"))
        answers = [] if given is None else [given] if isinstance(given, str) else given
        if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
            raise ValueError("answer must be a text, answers a list of texts")
        choices = _choices(row.get("choices"))
        if choices:
            letters = {text: letter for letter, text in choices.items()} | {letter: letter for letter in choices}
            wrong = [answer for answer in answers if answer not in letters]
            if wrong:
                raise ValueError(f"the answer {wrong[0]!r} is none of the choices")
            answers = [letters[answer] for answer in answers]
        elif self.metrics[0] == "choice":
            raise ValueError("the metric choice needs choices")
        question_id = row.get("question_id", number)
        if not isinstance(question_id, (int, str)):
            raise ValueError("question_id must be a number or a text")
        listed = "".join(f"\n{letter}. {text}" for letter, text in choices.items())
        tail = f"\n{self.instruction}" if self.instruction else ""
        return Question(
            question_id=question_id,
            image_id=str(row.get("image_id", row["image"])),
            image=row["image"],
            question=row["question"],
            prompt=f"{row['question']}{listed}{tail}",
            question_type=str(row.get("type") or "all"),
            answers=tuple(answers),
            choices=choices,
        )

    def score(self, prediction: str, question: Question) -> float:
        """By the first of the metrics."""
        return self._score(self.metrics[0], prediction, question)

    def _score(self, name: str, prediction: str, question: Question) -> float:
        if name == "choice":
            return float(extract_choice(prediction, question.choices) == question.answers[0])
        if name == "label":
            return float(self._label(prediction) in map(_plain, question.answers))
        if name == "rouge_l":
            return rouge_l([caption_tokens(prediction)], [[caption_tokens(text) for text in question.answers]])
        return _BY_ANSWERS[name](prediction, question.answers)

    def _label(self, text: str) -> str:
        """The class that an answer is, or that is the only one whose words it holds; else neither."""
        plain = _plain(text)
        if plain in self._labels:
            return plain
        inside = [label for label in self._labels if label and f" {label} " in f" {plain} "]
        return inside[0] if len(inside) == 1 else NEITHER

    def reading(self, prediction: str, question: Question) -> dict[str, Any]:
        """The letter where there are choices, the class where answers are classes."""
        found: dict[str, Any] = super().reading(prediction, question) if self.metrics[0] == "choice" else {}
        return found | ({"label": self._label(prediction)} if self._labels else {})

    def settle(self, rows: list[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
        """A judge is asked where the score is that of a choice."""
        return super().settle(rows, out) if self.metrics[0] == "choice" else rows

    def further(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """All metrics that were asked for, by name; for classes precision, recall, F1 and the confusion matrix."""
        found = super().further(rows) if self.metrics[0] == "choice" else {}
        for name in self.metrics:
            if name in _OF_CORPUS:
                predictions = [caption_tokens(row["prediction"]) for row in rows]
                references = [[caption_tokens(text) for text in row["answers"]] for row in rows]
                found[name] = _OF_CORPUS[name](predictions, references)
            elif name == self.metrics[0]:
                found[name] = mean(row["score"] for row in rows)
            elif name != "macro_f1":
                found[name] = mean(self._score(name, row["prediction"], self.by_id[row["question_id"]]) for row in rows)
        return found | (self._classes(rows) if self._labels else {})

    def _classes(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        said = [self._label(row["prediction"]) for row in rows]
        wanted = [_plain(row["answers"][0]) for row in rows]
        found = {"macro_f1": macro_f1(said, wanted)}
        for label, scores in class_scores(said, wanted).items():
            for kind in ("precision", "recall", "f1"):
                found[f"{kind}[{label}]"] = getattr(scores, kind)
        matrix = confusion_matrix(said, wanted)
        return found | {f"confusion[{gold} read as {given}]": float(n) for (gold, given), n in sorted(matrix.items())}

    def submission(self, rows: Sequence[Mapping[str, Any]]) -> Submission | None:
        """``[{"question_id", "answer"}]`` where there are no answers to score by."""
        if self.is_scored:
            return None
        answers = [{"question_id": row["question_id"], "answer": row["prediction"]} for row in rows]
        return Submission("custom_results.json", json.dumps(answers, ensure_ascii=False).encode())


def _choices(given: Any) -> dict[str, str]:
    if given is None:
        return {}
    if isinstance(given, list) and all(isinstance(text, str) for text in given):
        return lettered(given)
    if isinstance(given, dict) and len(given) > 1 and all(isinstance(text, str) for text in given.values()):
        return given
    raise ValueError("choices must be a list of at least two texts, or an object of letters and texts")


def _plain(text: str) -> str:
    return " ".join(text.lower().strip().strip(".!").split())
