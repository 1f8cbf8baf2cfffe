"""Reader of TextVQA 0.5.1 annotation files (questions with ten answers), which the demo set uses too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgm_exp.errors import DataError
from mgm_exp.evaluate.benchmarks.base import refuse
from mgm_exp.store import read_record

N_ANSWERS = 10


@dataclass(frozen=True)
class Annotation:
    """One row of an annotation file.

    Args:
        question_id: The file's own id; ``<image_id>/<row>`` where the file has none (the scorer does not need one).
        question_type: The file's own type; None where it has none, as in TextVQA.
    """

    question_id: int | str
    image_id: str
    question: str
    answers: tuple[str, ...]
    question_type: str | None


def read_annotations(path: Path) -> tuple[str, list[Annotation]]:
    """Split name and rows of an annotation file; those of a test file have no answers.

    Args:
        path: ``TextVQA_0.5.1_val.json`` or a file of its form: ``{"dataset_type", "data": [{"question", "image_id",
            "answers", "question_id", ...}]}``. Other keys are not read.

    Raises:
        DataError: the file is missing or not of this form; faulty rows are counted and named.
    """
    try:
        raw = read_record(path)
    except FileNotFoundError as error:
        raise DataError(
            f"The annotation file {path} does not exist.", advice="Give the path of an existing file."
        ) from error
    except (ValueError, OSError) as error:
        raise DataError(f"The annotation file {path} cannot be read as JSON: {error}.") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("data"), list):
        raise DataError(
            f"{path} is not a TextVQA annotation file: it needs an object with the list 'data' in it.",
            advice="TextVQA_0.5.1_val.json is expected here.",
        )
    rows, faults = [], []
    # In the test file no row has answers; a single row without them is a fault.
    is_public = any(isinstance(row, dict) and "answers" in row for row in raw["data"])
    for place, row in enumerate(raw["data"]):
        fault = _fault(row, is_public)
        if fault:
            faults.append(f"row {place}: {fault}")
        else:
            rows.append(_annotation(row, place))
    refuse(faults, f"{path}: rows that cannot be scored (of {len(raw['data'])}):", "Repair them or take them out.")
    split = raw.get("dataset_type") or (raw["data"][0].get("set_name") if raw["data"] else None)
    return str(split or "unknown"), rows


def _fault(row: Any, is_public: bool) -> str | None:
    if not isinstance(row, dict):
        return f"an object is needed, not {type(row).__name__}"
    missing = [key for key in ("question", "image_id") if not isinstance(row.get(key), str)]
    if missing:
        return f"{' and '.join(missing)} missing"
    answers = row.get("answers") if is_public else []
    if answers is None:
        return "no answers (the answers of the test split are not public: use the val split)"
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        return "answers must be a list of texts"
    if is_public and len(answers) != N_ANSWERS:
        return f"{len(answers)} answers where the metric needs {N_ANSWERS}"
    if not isinstance(row.get("question_id", ""), (int, str)):
        return f"question_id must be a number or a text, not {row['question_id']!r}"
    return None


def _annotation(row: dict[str, Any], place: int) -> Annotation:
    kind = row.get("question_type")
    return Annotation(
        question_id=row.get("question_id", f"{row['image_id']}/{place}"),
        image_id=row["image_id"],
        question=row["question"],
        answers=tuple(row.get("answers") or ()),
        question_type=kind if isinstance(kind, str) and kind else None,
    )
