"""ScienceQA-IMG: the questions of one split that have an image, from the official files or from parquet files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mgm_exp.evaluate.benchmarks.base import Question, Settings, Source, refuse
from mgm_exp.evaluate.benchmarks.multiple_choice import LETTER_ONLY, MultipleChoice, lettered
from mgm_exp.evaluate.pictures import Pictures
from mgm_exp.evaluate.readers import image_bytes, parquet_files, read_json_object, read_parquet

_PARQUET_SPLIT = {"val": "validation"}


class ScienceQa(MultipleChoice):
    """ScienceQA, questions with an image.

    Args:
        questions: ``problems.json``, or parquet files.
        splits: ``pid_splits.json``; None with parquet files.
        image_root: Folder of ``<id>/image.png``; with parquet files, where their images are kept.
        split: train, val or test.
        settings: Batch size and limits.
    """

    name = "scienceqa"
    sources = (
        Source("questions", "file or folder", "problems.json, or parquet files"),
        Source("splits", "file", "pid_splits.json"),
        Source("images", "folder", "the folder of the split's images"),
    )

    def __init__(self, questions: Path, splits: Path | None, image_root: Path, split: str, settings: Settings) -> None:
        super().__init__(image_root, settings)
        self.question_file, self.split_file, self.split = Path(questions), splits, split

    @classmethod
    def needs(cls, section: Any) -> tuple[Source, ...]:
        if section.questions is None or section.questions.endswith(".json"):
            return cls.sources
        return tuple(replace(source, is_needed=source.key == "questions") for source in cls.sources)

    @classmethod
    def configured(cls, name: str, section: Any, settings: Settings, cache: Path) -> ScienceQa:
        questions = Path(section.questions)
        if questions.suffix != ".json":
            return cls(questions, None, cache, section.split, settings)
        return cls(questions, Path(section.splits), Path(section.images), section.split, settings)

    def read(self) -> list[Question]:
        """The split's questions that have an image, in its order."""
        faults: list[str] = []
        questions = []
        for question_id, image, row in self._in_parquet(faults) if self.split_file is None else self._in_json(faults):
            try:
                questions.append(_question(question_id, image, row))
            except (KeyError, ValueError, TypeError, IndexError) as error:
                faults.append(f"{question_id}: {type(error).__name__} {error}")
        refuse(faults, f"scienceqa: questions of {self.question_file} that cannot be used:", "Download the file again.")
        return questions

    def _in_json(self, faults: list[str]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
        assert self.split_file is not None
        problems = read_json_object(self.question_file)
        for question_id in read_json_object(self.split_file, [self.split])[self.split]:
            row = problems.get(str(question_id))
            if not isinstance(row, dict):
                faults.append(f"{question_id} stands in {Path(self.split_file).name} only")
            elif row.get("image"):
                yield str(question_id), f"{question_id}/{row['image']}", row

    def _in_parquet(self, faults: list[str]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
        pictures = Pictures(self.image_root)
        named = _PARQUET_SPLIT.get(self.split, self.split)
        for file in parquet_files(self.question_file, named):
            for place, row in enumerate(read_parquet(file, ("image", "question", "choices", "answer"))):
                content = image_bytes(row["image"])
                if content is not None:
                    try:
                        yield f"{file.stem}/{place}", pictures.keep(content), row
                    except ValueError as error:
                        faults.append(f"{file.name}, row {place}: {error}")


def _question(question_id: str, image: str, row: Mapping[str, Any]) -> Question:
    choices = lettered([str(choice) for choice in row["choices"]])
    answer = dict(enumerate(choices))[int(row["answer"])]
    # LLaVA's form CQM: context, question, options in one line, doubled blanks made one.
    context = str(row.get("hint") or "").strip() or "N/A"
    options = " ".join(f"({letter}) {text}" for letter, text in choices.items())
    asked = f"Context: {context}\nQuestion: {row['question']}\nOptions: {options}\n".replace("  ", " ").strip()
    return Question(
        question_id=question_id,
        image_id=question_id,
        image=image,
        question=str(row["question"]),
        prompt=f"{asked}\n{LETTER_ONLY}",
        question_type=str(row.get("subject") or "unknown"),
        answers=(answer,),
        choices=choices,
    )
