"""MMMU from its parquet files: thirty subjects, multiple choice and open questions.

MGM sees one image: it is shown the question's first one, and ``<image 2>`` stays a word, as in the official code. That
code answers some questions at random (several images among the options, an answer it cannot read); here they are asked
and read like all others, and an unreadable answer is wrong.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mgm_exp.evaluate.benchmarks.base import Question, Settings, Source, Submission, mean, refuse
from mgm_exp.evaluate.benchmarks.multiple_choice import LETTER_ONLY, MultipleChoice, lettered
from mgm_exp.evaluate.benchmarks.textvqa import INSTRUCTION
from mgm_exp.evaluate.metrics import open_answer_accuracy
from mgm_exp.evaluate.pictures import Pictures
from mgm_exp.evaluate.readers import image_bytes, literal_list, parquet_files, read_parquet

_ID = re.compile(r"[a-z]+_(.+)_\d+")
_UNKNOWN = "?"
"""What stands for an answer that is not public."""
DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        *("Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine"),
        *("Pharmacy", "Public_Health"),
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        *("Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics"),
        *("Energy_and_Power", "Materials", "Mechanical_Engineering"),
    ),
}
_DOMAIN_OF = {subject: domain for domain, subjects in DOMAINS.items() for subject in subjects}


class Mmmu(MultipleChoice):
    """MMMU.

    Args:
        questions: Folder of parquet files, or one of them.
        split: Files of a folder whose name begins so.
        cache: Folder for the images.
        settings: Batch size and limits.
    """

    name = "mmmu"
    metric_version = "vlmevalkit-1+official-open-1"
    sources = (Source("questions", "file or folder", "the folder of parquet files"),)

    def __init__(self, questions: Path, split: str, cache: Path, settings: Settings) -> None:
        super().__init__(cache, settings)
        self.folder, self.split = Path(questions), split

    @classmethod
    def configured(cls, name: str, section: Any, settings: Settings, cache: Path) -> Mmmu:
        return cls(Path(section.questions), section.split, cache, settings)

    def read(self) -> list[Question]:
        """Questions in the order of the files' paths."""
        pictures, questions, faults = Pictures(self.image_root), [], []
        for file in parquet_files(self.folder, self.split):
            for row in read_parquet(file, ("id", "question", "options", "answer", "question_type", "image_1")):
                try:
                    questions.append(_question(row, pictures))
                except (ValueError, TypeError, KeyError) as error:
                    faults.append(f"{row['id']}: {error}")
        refuse(faults, f"mmmu: questions in {self.folder} that cannot be used:", "Download the files again.")
        return questions

    def score(self, prediction: str, question: Question) -> float:
        """By the letter where there are options, else by the official reading of open answers."""
        if question.choices:
            return super().score(prediction, question)
        return open_answer_accuracy(prediction, question.answers)

    def reading(self, prediction: str, question: Question) -> dict[str, Any]:
        """The letter, for questions with options."""
        return super().reading(prediction, question) if question.choices else {}

    def further(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """By domain, by kind of question, and for questions that had more images than the one shown."""
        groups: dict[str, list[float]] = defaultdict(list)
        for row in rows:
            question = self.by_id[row["question_id"]]
            if question.question_type in _DOMAIN_OF:
                groups[f"domain[{_DOMAIN_OF[question.question_type]}]"].append(row["score"])
            groups["multiple_choice" if question.choices else "open"].append(row["score"])
            if question.tags["images"] != "1":
                groups["several_images"].append(row["score"])
        found = {name: mean(scores) for name, scores in sorted(groups.items())}
        return (super().further(rows) if any("choice" in row for row in rows) else {}) | found

    def submission(self, rows: Sequence[Mapping[str, Any]]) -> Submission | None:
        """EvalAI's form for the test split: ``{id: letter or answer}``."""
        if self.is_scored:
            return None
        answers = {str(row["question_id"]): row.get("choice") or row["prediction"] for row in rows}
        return Submission(f"mmmu_{self.split}_submission.json", json.dumps(answers, ensure_ascii=False).encode())


def _question(row: Mapping[str, Any], pictures: Pictures) -> Question:
    content = image_bytes(row["image_1"])
    if content is None:
        raise ValueError("image_1 is empty")
    text, options = str(row["question"]), literal_list(row["options"])
    choices = lettered(options) if row["question_type"] == "multiple-choice" else {}
    if choices:
        listed = "".join(f"({letter}) {option}\n" for letter, option in choices.items())
        prompt = f"{text}\n\n{listed}\n\n{LETTER_ONLY}"
    else:
        prompt = f"{text}\n\n{INSTRUCTION}"
    subject = _ID.fullmatch(str(row["id"]))
    return Question(
        question_id=str(row["id"]),
        image_id=str(row["id"]),
        image=pictures.keep(content),
        question=text,
        prompt=prompt,
        question_type=subject.group(1) if subject else "unknown",
        answers=_answers(str(row["answer"]), choices),
        choices=choices,
        tags={"images": str(sum(image_bytes(row.get(f"image_{k}")) is not None for k in range(1, 8)))},
    )


def _answers(answer: str, choices: Mapping[str, str]) -> tuple[str, ...]:
    if answer == _UNKNOWN:
        return ()
    if choices and answer not in choices:
        raise ValueError(f"the answer {answer!r} is none of the options {', '.join(choices)}")
    # Several right answers to an open question stand there as the text of a Python list.
    return tuple(literal_list(answer)) if not choices and answer.startswith("[") else (answer,)
