"""VQAv2 and OK-VQA from the official question and annotation files; COCO images."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mgm_exp.evaluate.benchmarks.base import Benchmark, Question, Settings, Source, Submission, mean, refuse
from mgm_exp.evaluate.benchmarks.textvqa import INSTRUCTION
from mgm_exp.evaluate.metrics import normalize_textvqa, vqa_accuracy
from mgm_exp.evaluate.readers import read_json_object


class Vqa(Benchmark):
    """Open questions with ten answers each, scored by the official accuracy.

    Args:
        name: ``vqav2`` or ``okvqa``.
        questions: ``{"questions": [{"question_id", "image_id", "question"}], "data_subtype"}``.
        annotations: ``{"annotations": [{"question_id", "question_type", "answer_type", "answers": [{"answer"}]}]}``;
            None: answers are not public, only a submission file is made.
        image_root: Folder of ``COCO_<data_subtype>_<image id, 12 digits>.jpg``.
        settings: Batch size and limits.
    """

    metric_version = "official-v2-1"
    sources = (
        Source("questions", "file", "the question file"),
        Source("annotations", "file", "the annotation file", is_needed=False),
        Source("images", "folder", "the folder of COCO images"),
    )

    def __init__(
        self, name: str, questions: Path, annotations: Path | None, image_root: Path, settings: Settings
    ) -> None:
        super().__init__(image_root, settings)
        self.name, self.split = name, "unknown"
        self.question_file, self.annotation_file = Path(questions), annotations

    @classmethod
    def configured(cls, name: str, section: Any, settings: Settings, cache: Path) -> Vqa:
        annotations = Path(section.annotations) if section.annotations else None
        return cls(name, Path(section.questions), annotations, Path(section.images), settings)

    def read(self) -> list[Question]:
        """Questions in the order of the question file."""
        content = read_json_object(self.question_file, ["questions"])
        self.split = str(content.get("data_subtype") or "unknown")
        annotated = self._annotations()
        rows, faults = [], []
        for place, row in enumerate(content["questions"]):
            try:
                rows.append(self._question(row, annotated))
            except (KeyError, TypeError, ValueError) as error:
                faults.append(f"question {place}: {_why(error)}")
        advice = "Both files must be of the same split and version."
        refuse(faults, f"{self.name}: questions of {self.question_file} that cannot be used:", advice)
        if annotated is not None:
            left = sorted(set(annotated) - {row.question_id for row in rows})
            refuse(left, f"{self.name}: annotations of questions that {self.question_file} does not hold:", advice)
        return rows

    def _annotations(self) -> dict[int | str, Mapping[str, Any]] | None:
        if self.annotation_file is None:
            return None
        content = read_json_object(self.annotation_file, ["annotations"])
        names = content.get("question_types")  # OK-VQA: "one" -> "Vehicles and Transportation"
        names = names if isinstance(names, dict) else {}
        found: dict[int | str, Mapping[str, Any]] = {}
        faults = []
        for place, row in enumerate(content["annotations"]):
            try:
                answers = tuple(str(answer["answer"]) for answer in row["answers"])
                if not answers:
                    raise ValueError("no answer")
                kind = str(row.get("question_type", "unknown"))
                found[row["question_id"]] = {
                    "answers": answers,
                    "question_type": str(names.get(kind, kind)),
                    "answer_type": str(row.get("answer_type", "unknown")),
                }
            except (KeyError, TypeError, ValueError) as error:
                faults.append(f"annotation {place}: {_why(error)}")
        refuse(faults, f"{self.name}: annotations of {self.annotation_file} that cannot be used:", "Repair the file.")
        return found

    def _question(self, row: Any, annotated: Mapping[int | str, Mapping[str, Any]] | None) -> Question:
        question_id, text, image_id = row["question_id"], row["question"], row["image_id"]
        if not isinstance(text, str) or not isinstance(question_id, (int, str)):
            raise TypeError("question must be a text, question_id a number or a text")
        if annotated is not None and question_id not in annotated:
            raise ValueError(f"question_id {question_id} has no annotation")
        known = annotated[question_id] if annotated is not None else None
        # The images of test-dev are those of test.
        folder = self.split.replace("-dev", "")
        return Question(
            question_id=question_id,
            image_id=str(image_id),
            image=f"COCO_{folder}_{int(image_id):012d}.jpg",
            question=text,
            prompt=f"{text}\n{INSTRUCTION}",
            question_type=self._type(known),
            answers=known["answers"] if known else (),
            tags={"question_type": known["question_type"]} if known else {},
        )

    def _type(self, known: Mapping[str, Any] | None) -> str:
        if known is None:
            return "unknown"
        return str(known["question_type" if self.name == "okvqa" else "answer_type"])

    def score(self, prediction: str, question: Question) -> float:
        """The official accuracy of what the model said, as it said it."""
        return vqa_accuracy(prediction, question.answers)

    def further(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """``accuracy_normalized``: of the answers as they stand in the submission file; ``question[...]``: by type.

        LLaVA normalises answers before it hands them in, which the official code does not do where all people agree:
        "Yes" against ten times "yes" is 0 as it is, and 1 after that.
        """
        by_type: dict[str, list[float]] = defaultdict(list)
        for row in rows:
            by_type[self.by_id[row["question_id"]].tags["question_type"]].append(row["score"])
        normalized = (vqa_accuracy(normalize_textvqa(row["prediction"]), row["answers"]) for row in rows)
        types = {} if self.name == "okvqa" else {f"question[{kind}]": mean(by_type[kind]) for kind in sorted(by_type)}
        return {"accuracy_normalized": mean(normalized), **types}

    def submission(self, rows: Sequence[Mapping[str, Any]]) -> Submission:
        """EvalAI's form: ``[{"question_id", "answer"}]``, answers normalised as LLaVA does for the server."""
        return evalai_submission(f"{self.name}_{self.split}_results.json", rows)


def evalai_submission(name: str, rows: Sequence[Mapping[str, Any]]) -> Submission:
    """Answers in EvalAI's form, each in M4C's normal form."""
    answers = [{"question_id": row["question_id"], "answer": normalize_textvqa(row["prediction"])} for row in rows]
    return Submission(name, json.dumps(answers).encode())


def _why(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)
