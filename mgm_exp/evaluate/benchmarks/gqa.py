"""GQA from its own files: balanced questions, and for consistency those that they entail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mgm_exp.errors import DataError
from mgm_exp.evaluate.benchmarks.base import Benchmark, Question, Settings, Source, refuse
from mgm_exp.evaluate.benchmarks.textvqa import INSTRUCTION
from mgm_exp.evaluate.metrics import gqa, gqa_prediction
from mgm_exp.evaluate.readers import read_json_object


class Gqa(Benchmark):
    """GQA, scored by its authors' evaluator.

    Args:
        questions: Question id -> question, such as ``testdev_balanced_questions.json``.
        choices: Question id -> valid and plausible answers; None: validity and plausibility are left out.
        image_root: Folder of ``<imageId>.jpg``.
        consistency: Also ask the questions that balanced ones entail. They are scored, but do not count.
        settings: Batch size and limits.
    """

    name = "gqa"
    metric_version = "official-1"
    sources = (
        Source("questions", "file", "testdev_balanced_questions.json"),
        Source("choices", "file", "testdev_balanced_choices.json", is_needed=False),
        Source("images", "folder", "the folder of images"),
    )

    def __init__(
        self, questions: Path, choices: Path | None, image_root: Path, consistency: bool, settings: Settings
    ) -> None:
        super().__init__(image_root, settings)
        self.question_file, self.choice_file, self.consistency = Path(questions), choices, consistency
        self.split = Path(questions).name.removesuffix(".json").removesuffix("_questions")
        self._raw: dict[str, Mapping[str, Any]] = {}

    @classmethod
    def configured(cls, name: str, section: Any, settings: Settings, cache: Path) -> Gqa:
        choices = Path(section.choices) if section.choices else None
        return cls(Path(section.questions), choices, Path(section.images), section.consistency, settings)

    def read(self) -> list[Question]:
        """Balanced questions in the order of the file, then the other ones that they entail."""
        content = read_json_object(self.question_file)
        faults = [f"{key}: {fault}" for key, row in content.items() if (fault := _fault(row))]
        refuse(
            faults, f"gqa: questions of {self.question_file} that cannot be used:", "Is it a question file of GQA 1.2?"
        )
        self._raw = content
        balanced = [key for key, row in content.items() if row["isBalanced"]]
        if not balanced:
            raise DataError(f"gqa: {self.question_file} holds no balanced question, and only these are scored.")
        entailed = self._entailed(balanced) if self.consistency else []
        lacking = [key for key in entailed if key not in content]
        refuse(
            lacking,
            f"gqa: eval.gqa.consistency=true, but {self.question_file} lacks questions that its balanced ones entail:",
            "Use a file with all questions (val_all_questions.json), or consistency=false.",
        )
        return [_asked(key, content[key]) for key in [*balanced, *entailed]]

    def _entailed(self, balanced: Sequence[str]) -> list[str]:
        known = set(balanced)
        others = (other for key in balanced for other in self._raw[key]["entailed"] if other not in known)
        return list(dict.fromkeys(others))

    def first(self, questions: list[Question], n: int) -> list[Question]:
        """The first n balanced questions, with all that they entail (balanced ones among these entail more)."""
        wanted = {str(q.question_id) for q in [q for q in questions if self.counts(q)][:n]}
        todo = list(wanted) if self.consistency else []
        while todo:
            row = self._raw[todo.pop()]
            new = set(row["entailed"]) - wanted if row["isBalanced"] else set()
            wanted |= new
            todo += new
        return [q for q in questions if q.question_id in wanted]

    def files(self) -> list[Path]:
        """The question file holds what the breakdown needs."""
        return [self.question_file, *([Path(self.choice_file)] if self.choice_file else [])]

    def rephrased(self, texts: Mapping[str, str]) -> Benchmark:
        """As any benchmark's, without consistency: what a question entails may not have been rephrased."""
        changed = super().rephrased(texts)
        assert isinstance(changed, Gqa)
        changed.consistency = False
        return changed

    def counts(self, question: Question) -> bool:
        """Whether the question is balanced."""
        return question.tags["balanced"] == "yes"

    def score(self, prediction: str, question: Question) -> float:
        """1 where the answer, in lower case and without its last period, is the wanted string."""
        return float(gqa_prediction(prediction) == question.answers[0])

    def further(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """The official breakdown; ``distribution`` is a chi-square (lower is better), the others lie in 0..1."""
        predictions = {str(row["question_id"]): gqa_prediction(row["prediction"]) for row in rows}
        asked = {key: self._raw[key] for key in predictions}
        scores = gqa(predictions, asked, self._choices(asked), consistency=self.consistency)
        scores.pop("accuracy")
        return scores

    def _choices(self, asked: Mapping[str, Any]) -> Mapping[str, Mapping[str, Sequence[str]]] | None:
        if self.choice_file is None:
            return None
        choices = read_json_object(self.choice_file)
        lacking = [
            key
            for key, row in asked.items()
            if row["isBalanced"] and not {"valid", "plausible"} <= set(choices.get(key) or ())
        ]
        refuse(
            lacking,
            f"gqa: questions without valid and plausible answers in {self.choice_file}:",
            "Give the choices of the same split, or leave eval.gqa.choices out.",
        )
        return choices


def _fault(row: Any) -> str | None:
    keys = ("semantic", "entailed", "question", "imageId", "isBalanced", "groups", "answer", "types")
    missing = [key for key in keys if not isinstance(row, dict) or key not in row]
    if missing:
        return f"{', '.join(missing)} missing"
    if not isinstance(row["answer"], str) or not isinstance(row["question"], str):
        return "question and answer must be texts"
    if not isinstance(row["types"], dict) or not {"structural", "semantic", "detailed"} <= set(row["types"]):
        return "types must hold structural, semantic and detailed"
    return None if isinstance(row["groups"], dict) and "global" in row["groups"] else "groups must hold global"


def _asked(key: str, row: Mapping[str, Any]) -> Question:
    return Question(
        question_id=key,
        image_id=str(row["imageId"]),
        image=f"{row['imageId']}.jpg",
        question=row["question"],
        prompt=f"{row['question']}\n{INSTRUCTION}",
        question_type=str(row["types"]["structural"]),
        answers=(row["answer"],),
        tags={"balanced": "yes" if row["isBalanced"] else "no"},
    )
