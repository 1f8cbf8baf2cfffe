"""SEED-Bench: its multiple-choice questions about single images (nine of its twelve dimensions)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mgm_exp.evaluate.benchmarks.base import Question, Settings, Source, refuse
from mgm_exp.evaluate.benchmarks.multiple_choice import LETTER_ONLY, MultipleChoice
from mgm_exp.evaluate.readers import read_json_object


class SeedBench(MultipleChoice):
    """SEED-Bench, image part.

    Args:
        questions: ``SEED-Bench.json``.
        image_root: Folder ``SEED-Bench-image``; its files are called by ``data_id``.
        settings: Batch size and limits.
    """

    name, split = "seedbench", "image"
    sources = (
        Source("questions", "file", "SEED-Bench.json"),
        Source("images", "folder", "the folder SEED-Bench-image"),
    )

    def __init__(self, questions: Path, image_root: Path, settings: Settings) -> None:
        super().__init__(image_root, settings)
        self.question_file = Path(questions)

    @classmethod
    def configured(cls, name: str, section: Any, settings: Settings, cache: Path) -> SeedBench:
        return cls(Path(section.questions), Path(section.images), settings)

    def read(self) -> list[Question]:
        """The image questions in the order of the file; those about videos are not part of it."""
        content = read_json_object(self.question_file, ["questions"])
        types = content.get("question_type")
        names = {number: name for name, number in types.items()} if isinstance(types, dict) else {}
        questions, faults = [], []
        for place, row in enumerate(content["questions"]):
            try:
                if row["data_type"] == "image":
                    questions.append(_question(row, names))
            except (KeyError, ValueError, TypeError) as error:
                faults.append(f"question {place}: {type(error).__name__} {error}")
        refuse(faults, f"seedbench: questions of {self.question_file} that cannot be used:", "Download the file again.")
        return questions


def _question(row: Mapping[str, Any], names: Mapping[Any, str]) -> Question:
    choices = {letter: str(row[f"choice_{letter.lower()}"]) for letter in "ABCD"}
    if row["answer"] not in choices:
        raise ValueError(f"the answer {row['answer']!r} is none of A, B, C, D")
    listed = "".join(f"\n{letter}. {text}" for letter, text in choices.items())
    kind = row.get("question_type_id")
    return Question(
        question_id=row["question_id"],
        image_id=str(row["data_id"]),
        image=str(row["data_id"]),
        question=str(row["question"]),
        prompt=f"{row['question']}{listed}\n{LETTER_ONLY}",
        question_type=names.get(kind, str(kind)),
        answers=(row["answer"],),
        choices=choices,
    )
