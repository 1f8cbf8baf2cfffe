"""The generated demo questions: TextVQA's file form and TextVQA's score, on scenes that no run was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mgm_exp.errors import DataError
from mgm_exp.evaluate.benchmarks.annotations import read_annotations
from mgm_exp.evaluate.benchmarks.base import Benchmark, Question, Settings


class Demo(Benchmark):
    """Questions of one split of the demo data; the prompt is the bare question, as in its training rows.

    Args:
        folder: What ``mgm_exp.data.demo.write_demo`` wrote.
        split: "val" for choosing hyper-parameters; "test" for the table, used for nothing else.
        settings: Batch size and limits.
    """

    name = "demo"
    metric_version = "m4c-1"

    def __init__(self, folder: Path, split: str, settings: Settings) -> None:
        super().__init__(folder, settings)
        if split not in ("val", "test"):
            raise DataError(f"The demo data has no split {split!r} to be evaluated on; allowed are 'val' and 'test'.")
        self.split = split

    @classmethod
    def configured(cls, name: str, section: Any, settings: Settings, cache: Path) -> Demo:
        return cls(cache, section.split, settings)

    def read(self) -> list[Question]:
        """One question for each image of the split."""
        _, annotations = read_annotations(self.image_root / f"{self.split}.json")
        return [
            Question(
                question_id=a.question_id,
                image_id=a.image_id,
                image=f"images/{a.image_id}.png",
                question=a.question,
                prompt=a.question,
                question_type=a.question_type or "other",
                answers=a.answers,
            )
            for a in annotations
        ]
