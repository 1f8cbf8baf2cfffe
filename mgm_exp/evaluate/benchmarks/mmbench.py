"""MMBench from its TSV with images inside: English and Chinese, circular, first pass and all rows, never mixed."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mgm_exp.errors import DataError
from mgm_exp.evaluate.benchmarks.base import Benchmark, Question, Settings, Source, Submission, refuse
from mgm_exp.evaluate.benchmarks.multiple_choice import LETTER_ONLY, MultipleChoice
from mgm_exp.evaluate.circular import (
    ROTATION,
    CircularRow,
    all_rows_accuracy,
    circular_hits,
    first_pass_accuracy,
)
from mgm_exp.evaluate.pictures import Pictures
from mgm_exp.evaluate.readers import read_tsv
from mgm_exp.evaluate.spreadsheet import workbook

LETTER_ONLY_CN = "请直接回答选项字母。"
ABBREVIATIONS = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}
_NOT_SUBMITTED = ("hint", "category", "source", "image", "comment", "l2-category")
_PREDICTION_COLUMN = 6
_MISSING = frozenset(("#N/A", "#N/A N/A", "#NA", "-NaN", "-nan", "<NA>", "N/A", "NA", "NULL", "NaN", "n/a", "null"))
"""What pandas reads as a missing value in a TSV."""
_REFERENCE = 64
"""Characters up to which an image cell is the index of the row that holds the image."""

log = logging.getLogger(__name__)


class MmBench(MultipleChoice):
    """MMBench in one language.

    Args:
        name: ``mmbench`` or ``mmbench_cn``, which decides the language of the instruction.
        questions: TSV with index, question, hint, A, B, C, D, answer, category, l2-category, image (base64).
        only_first: Leaves out the rotated rows; there is no circular score then.
        cache: Folder for the images.
        settings: Batch size and limits.
    """

    sources = (Source("questions", "file", "the TSV file"),)

    def __init__(self, name: str, questions: Path, only_first: bool, cache: Path, settings: Settings) -> None:
        super().__init__(cache, settings)
        self.name, self.question_file, self.only_first = name, Path(questions), only_first
        self.split = "unknown"
        self.instruction = LETTER_ONLY_CN if name.endswith("_cn") else LETTER_ONLY
        self._columns: list[str] = []
        self._cells: dict[int, dict[str, str]] = {}
        self._is_circular = False

    @classmethod
    def configured(cls, name: str, section: Any, settings: Settings, cache: Path) -> MmBench:
        return cls(name, Path(section.questions), section.rows.value == "first", cache, settings)

    def read(self) -> list[Question]:
        """Questions in the order of the file, rotations among them."""
        columns, rows = read_tsv(self.question_file)
        # Names vary in case between versions of the file.
        self._columns = columns
        plain = {name: name.lower() for name in columns}
        missing = [name for name in ("index", "question", "a", "b", "image") if name not in plain.values()]
        if missing:
            raise DataError(
                f"{self.name}: {self.question_file} lacks the columns {missing}; it has {columns[:14]}.",
                advice="Is it an MMBench TSV, such as mmbench_dev_20230712.tsv?",
            )
        self._cells, pictures, images, faults = {}, Pictures(self.image_root), {}, []
        for number, row in rows:
            cells = {plain[name]: value for name, value in row.items()}
            try:
                index = int(cells["index"])
                if index in self._cells:
                    raise ValueError(f"index {index} stands there twice")
                image = cells.pop("image")
                images[index] = image if len(image) <= _REFERENCE else pictures.keep_base64(image)
                self._cells[index] = cells
            except ValueError as error:
                faults.append(f"line {number}: {error}")
        questions = []
        for index, cells in self._cells.items():
            try:
                if not (self.only_first and index >= ROTATION):
                    questions.append(self._question(index, cells, _image_of(index, images)))
            except ValueError as error:
                faults.append(f"index {index}: {error}")
        refuse(faults, f"{self.name}: rows of {self.question_file} that cannot be used:", "Download the file again.")
        splits = {cells.get("split", "") for cells in self._cells.values()} - {""}
        self.split = splits.pop() if len(splits) == 1 else self.question_file.stem
        self._check_rotations(questions)
        return questions

    def _question(self, index: int, cells: Mapping[str, str], image: str) -> Question:
        options = dict(_options(cells))
        if len(options) < 2:
            raise ValueError(f"{len(options)} options")
        answer = cells.get("answer", "").strip()
        if answer and answer not in options:
            raise ValueError(f"the answer {answer!r} is none of the options {', '.join(options)}")
        hint = cells.get("hint", "")
        text = f"{hint}\n{cells['question']}" if _is_given(hint) else cells["question"]
        listed = "".join(f"\n{letter}. {option}" for letter, option in options.items())
        category, l2 = cells.get("category") or "unknown", cells.get("l2-category") or "unknown"
        return Question(
            question_id=index,
            image_id=str(index % ROTATION),
            image=image,
            question=cells["question"],
            prompt=f"{text}{listed}\n{self.instruction}",
            question_type=category,
            answers=(answer,) if answer else (),
            choices=options,
            tags={"l2": ABBREVIATIONS.get(l2, l2)},
        )

    def _check_rotations(self, questions: Sequence[Question]) -> None:
        turns: dict[int, set[int]] = defaultdict(set)
        options: dict[int, int] = {}
        for question in questions:
            turn, base = divmod(int(question.question_id), ROTATION)
            turns[base].add(turn)
            options[base] = max(options.get(base, 0), len(question.choices))
        self._is_circular = not self.only_first and any(max(found) for found in turns.values())
        if not self._is_circular:
            return
        faults = [
            f"{base} (rows for {sorted(found)} of {options[base]} options)"
            for base, found in turns.items()
            if found != set(range(options[base]))
        ]
        refuse(
            faults,
            f"{self.name}: questions of {self.question_file} without one row for each rotation of their options:",
            f"Download the file again, or give eval.{self.name}.rows=first for the unrotated rows alone.",
        )

    def first(self, questions: list[Question], n: int) -> list[Question]:
        """The first n questions, each with all its rotations."""
        bases = dict.fromkeys(question.image_id for question in questions)
        wanted = set(list(bases)[:n])
        return [question for question in questions if question.image_id in wanted]

    def eval_key(self) -> dict[str, Any]:
        """As any benchmark's, with the number of questions that the rows are rotations of."""
        return super().eval_key() | {"n_questions": len({question.image_id for question in self.questions})}

    def rephrased(self, texts: Mapping[str, str]) -> Benchmark:
        """As any benchmark's; the words of an unrotated row hold for its rotations, unless they have their own."""
        bases = {str(q.question_id): texts[q.image_id] for q in self.questions if q.image_id in texts}
        return super().rephrased({**bases, **texts})

    def further(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """``circular_accuracy`` (and by category), ``first_pass_accuracy``, ``all_rows_accuracy``, ``unreadable``.

        The circular score is there if the file holds all rotations.
        """
        known = [self._circular_row(row) for row in rows]
        scores = super().further(rows)
        if any(row.index < ROTATION for row in known):
            scores["first_pass_accuracy"] = first_pass_accuracy(known)
        scores["all_rows_accuracy"] = all_rows_accuracy(known)
        if not self._is_circular:
            log.warning("%s: the rows that were asked hold no rotations, so there is no circular score", self.name)
            return scores
        by_category: dict[str, list[bool]] = defaultdict(list)
        hits = circular_hits(known)
        for base, is_hit in hits.items():
            question = self.by_id[base]
            for category in (question.tags["l2"], question.question_type):
                by_category[category].append(is_hit)
        scores["circular_accuracy"] = sum(hits.values()) / len(hits)
        return scores | {
            f"circular_accuracy[{name}]": sum(found) / len(found) for name, found in sorted(by_category.items())
        }

    def _circular_row(self, row: Mapping[str, Any]) -> CircularRow:
        question = self.by_id[row["question_id"]]
        return CircularRow(int(question.question_id), row["choice"], question.answers[0], len(question.choices))

    def submission(self, rows: Sequence[Mapping[str, Any]]) -> Submission:
        """The workbook that MMBench's server takes: the file's columns without the image and what describes it."""
        kept = [name for name in self._columns if name.lower() not in _NOT_SUBMITTED]
        header = [*kept[:_PREDICTION_COLUMN], "prediction", *kept[_PREDICTION_COLUMN:]]
        table: list[list[str | int]] = [list(header)]
        for row in rows:
            cells = self._cells[int(row["question_id"])] | {"prediction": row["prediction"]}
            table.append([int(cells["index"]) if name == "index" else cells[name.lower()] for name in header])
        return Submission(f"{self.name}_{self.split}_submission.xlsx", workbook(table))


def _is_given(text: str) -> bool:
    """Whether a cell holds a hint or an option, as LLaVA, MGM and VLMEvalKit see it through pandas."""
    return text not in _MISSING and text.lower() not in ("nan", "none") and bool(text.strip())


def _options(cells: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Letter and text of the options up to the first one that is empty."""
    for letter in "ABCD":
        text = cells.get(letter.lower(), "")
        if not _is_given(text):
            return
        yield letter, text


def _image_of(index: int, images: Mapping[int, str]) -> str:
    """Name of a row's image: its own, that of the row it refers to, or that of the unrotated row."""
    seen = set()
    place = index
    while place not in seen:
        seen.add(place)
        image = images.get(place, "")
        if "." in image:
            return image
        if not image.strip() and place < ROTATION:
            break
        place = int(image) if image.strip().isdecimal() else place % ROTATION
    raise ValueError("no image")
