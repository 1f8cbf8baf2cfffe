"""POPE: is there an object in the image? Three files that differ in how the absent objects were chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mgm_exp.errors import DataError
from mgm_exp.evaluate.benchmarks.base import Benchmark, Question, Settings, Source, mean, refuse
from mgm_exp.evaluate.benchmarks.mme import yes_no_metrics
from mgm_exp.evaluate.benchmarks.textvqa import INSTRUCTION
from mgm_exp.evaluate.metrics import class_scores, pope_yes_no
from mgm_exp.evaluate.readers import read_json_lines

_PREFIX = "coco_pope_"


class Pope(Benchmark):
    """POPE, scored by its authors' rule: whatever is not a "no" is a "yes".

    Args:
        questions: Folder of ``coco_pope_<category>.json`` (JSON lines in spite of the name), or one such file.
        image_root: Folder of COCO's val2014.
        settings: Batch size and limits.
    """

    name, split = "pope", "coco"
    metric_version = "official-1"
    sources = (
        Source("questions", "file or folder", "the folder of coco_pope_*.json"),
        Source("images", "folder", "the folder val2014 of COCO"),
    )

    def __init__(self, questions: Path, image_root: Path, settings: Settings) -> None:
        super().__init__(image_root, settings)
        self.question_files = Path(questions)

    @classmethod
    def configured(cls, name: str, section: Any, settings: Settings, cache: Path) -> Pope:
        return cls(Path(section.questions), Path(section.images), settings)

    def read(self) -> list[Question]:
        """Questions file by file; an id is only unique within its file."""
        place = self.question_files
        files = [place] if place.is_file() else sorted(place.glob(f"{_PREFIX}*.json"))
        if not files:
            raise DataError(f"pope: {place} holds no {_PREFIX}*.json.", advice="Give the folder of POPE's COCO files.")
        questions, faults = [], []
        for file in files:
            category = file.stem.removeprefix(_PREFIX)
            for number, row in read_json_lines(file):
                lacking = [key for key in ("question_id", "image", "text", "label") if key not in row]
                if lacking or row["label"] not in ("yes", "no"):
                    faults.append(
                        f"{file.name}, line {number}: question_id, image, text and label (yes, no) are needed"
                    )
                else:
                    questions.append(_question(category, row))
        refuse(faults, f"pope: lines of {place} that cannot be used:", "Download the files again.")
        return questions

    def score(self, prediction: str, question: Question) -> float:
        """1 where yes or no, as POPE reads it, is right."""
        return float(pope_yes_no(prediction) == question.answers[0])

    def reading(self, prediction: str, question: Question) -> dict[str, Any]:
        """``said``: yes or no."""
        return {"said": pope_yes_no(prediction)}

    def further(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Scores of "yes" over all answers; ``f1[category]`` and their mean, ``mean_f1``, which papers report."""
        by_category: dict[str, float] = {}
        for category in dict.fromkeys(row["question_type"] for row in rows):
            some = [row for row in rows if row["question_type"] == category]
            scores = class_scores([row["said"] for row in some], [row["answers"][0] for row in some])
            if "yes" in scores:
                by_category[category] = scores["yes"].f1
        metrics = yes_no_metrics(rows)
        # The rule has no third class: how many answers hold neither word is counted here.
        metrics["neither_share"] = mean(float(not _words(row["prediction"]) & {"yes", "no", "not"}) for row in rows)
        metrics |= {f"f1[{category}]": value for category, value in by_category.items()}
        return metrics | ({"mean_f1": mean(by_category.values())} if by_category else {})


def _words(text: str) -> set[str]:
    return {word.strip(".,!?\"'") for word in text.lower().split()}


def _question(category: str, row: Mapping[str, Any]) -> Question:
    return Question(
        question_id=f"{category}/{row['question_id']}",
        image_id=str(row["image"]),
        image=str(row["image"]),
        question=str(row["text"]),
        prompt=f"{row['text']}\n{INSTRUCTION}",
        question_type=category,
        answers=(row["label"],),
    )
