"""MathVista's multiple-choice questions. Its other part needs a language model to read the answers, and is left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mgm_exp.evaluate.benchmarks.base import Question, Settings, Source, refuse
from mgm_exp.evaluate.benchmarks.multiple_choice import LETTER_ONLY, MultipleChoice, lettered
from mgm_exp.evaluate.pictures import Pictures
from mgm_exp.evaluate.readers import image_bytes, parquet_files, read_json_object, read_parquet


class MathVista(MultipleChoice):
    """MathVista, multiple choice.

    Args:
        questions: ``testmini-*.parquet`` (a file or its folder), or ``testmini.json``.
        image_root: Folder that the paths of ``testmini.json`` are relative to; for parquet, where images are kept.
        settings: Batch size and limits.
    """

    name = "mathvista"
    sources = (
        Source("questions", "file or folder", "testmini-*.parquet or testmini.json"),
        Source("images", "folder", "the folder that holds images/", is_needed=False),
    )

    def __init__(self, questions: Path, image_root: Path, settings: Settings) -> None:
        super().__init__(image_root, settings)
        self.question_file = Path(questions)
        self.split = "testmini"

    @classmethod
    def configured(cls, name: str, section: Any, settings: Settings, cache: Path) -> MathVista:
        questions = Path(section.questions)
        if questions.suffix != ".json":
            return cls(questions, cache, settings)
        return cls(questions, Path(section.images) if section.images else questions.parent, settings)

    def read(self) -> list[Question]:
        """The multiple-choice questions, in the order of the file."""
        is_json, faults, questions = self.question_file.suffix == ".json", [], []
        pictures = Pictures(self.image_root)
        for row in self._in_json() if is_json else self._in_parquet():
            try:
                if row["question_type"] != "multi_choice":
                    continue
                image = str(row["image"]) if is_json else _kept(row, pictures)
                questions.append(_question(row, image))
            except (KeyError, ValueError, TypeError) as error:
                faults.append(f"{row.get('pid')}: {type(error).__name__} {error}")
        refuse(
            faults,
            f"mathvista: questions of {self.question_file} that cannot be used:",
            "The answers of the test split are not public: use testmini.",
        )
        return questions

    def _in_json(self) -> Iterator[Mapping[str, Any]]:
        for pid, row in read_json_object(self.question_file).items():
            yield {"pid": pid, **row} if isinstance(row, dict) else {"pid": pid}

    def _in_parquet(self) -> Iterator[Mapping[str, Any]]:
        for file in parquet_files(self.question_file, self.split):
            yield from read_parquet(file, ("pid", "question", "decoded_image", "choices", "answer", "question_type"))


def _kept(row: Mapping[str, Any], pictures: Pictures) -> str:
    content = image_bytes(row["decoded_image"])
    if content is None:
        raise ValueError("no image")
    return pictures.keep(content)


def _question(row: Mapping[str, Any], image: str) -> Question:
    choices = lettered([str(choice) for choice in row["choices"] or []])
    letters = [letter for letter, text in choices.items() if text == str(row["answer"])]
    if not letters:
        raise ValueError(f"the answer {row['answer']!r} is none of the choices")
    listed = "".join(f"\n({letter}) {text}" for letter, text in choices.items())
    written = f"{row['question']}\nChoices:{listed}\n{LETTER_ONLY}"
    metadata = row.get("metadata")
    return Question(
        question_id=str(row["pid"]),
        image_id=image,
        image=image,
        question=str(row["question"]),
        # The official query where the file has it: hint, question, choices.
        prompt=str(row.get("query") or written),
        question_type=str((metadata if isinstance(metadata, dict) else {}).get("task") or "unknown"),
        answers=(letters[0],),
        choices=choices,
    )
