"""TextVQA from its own files: annotation JSON 0.5.1, LLaVA's question JSONL (with OCR tokens), a folder of images.

In the question JSONL ``question_id`` is the id of the image and not unique, so questions are joined to their answers
by image and question text, as the official scorer does; from there on the annotation's own, unique id is carried.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgm_exp.errors import ConfigError, DataError
from mgm_exp.evaluate.benchmarks.annotations import Annotation, read_annotations
from mgm_exp.evaluate.benchmarks.base import Benchmark, Question, Settings, Source, Submission, refuse
from mgm_exp.evaluate.metrics import normalize_textvqa
from mgm_exp.store import parse_record, read_text

INSTRUCTION = "Answer the question using a single word or phrase."
OCR_LINE = "Reference OCR token:"

_SHORT_ANSWER = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)
# First match wins; what is left over is "other". TextVQA has no types of its own.
_TYPES = (
    ("brand", r"what (?:kind of |type of )?(?:brand|company|make|model)\b|who (?:makes|made|manufactures)\b"),
    ("time or date", r"what (?:time|year|date|day|month)\b|when\b"),
    ("number", r"what (?:is |are )?(?:the )?(?:\w+ )?(?:numbers?|price)\b|how (?:many|much|old|long|tall|far|fast)\b"),
    ("colour", r"what colou?r\b"),
    ("what does it say", r"what (?:does|do|did)\b.*\b(?:say|read|written)\b|what (?:is|are) (?:written|the words?)\b"),
    ("who", r"(?:who|whose)\b"),
    ("where", r"(?:where|what (?:city|country|state|place))\b"),
    ("which", r"which\b"),
    ("yes or no", r"(?:is|are|was|were|does|do|did|can|has|have|will|would|should)\b"),
    ("what", r"what\b"),
)
_TYPE_PATTERNS = tuple((name, re.compile(pattern)) for name, pattern in _TYPES)


def question_type(question: str) -> str:
    """A coarse type from the first words of a question, for the breakdown."""
    text = " ".join(question.lower().split())
    return next((name for name, pattern in _TYPE_PATTERNS if pattern.match(text)), "other")


def question_in(prompt: str) -> str:
    """The bare question inside a LLaVA prompt, by the official scorer's rules, but with its case kept.

    Forms: question, OCR line, instruction (the first two in any order); question, instruction; or
    "OCR tokens: ... Question: ... Short answer:".

    Raises:
        ValueError: the prompt has none of these forms.

    Source: dvlab-research/MGM, ``mgm/eval/eval_textvqa.py`` (``prompt_processor``).
    """
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        match = _SHORT_ANSWER.search(prompt)
        if match:
            return match.group(1)
    elif len(lines) == 3 and f"{OCR_LINE} " in prompt:
        return lines[1] if prompt.startswith(OCR_LINE) else lines[0]
    elif len(lines) == 2:
        return lines[0]
    raise ValueError(f"no TextVQA prompt: {prompt[:80]!r}")


def prompt_without_ocr(question: str) -> str:
    """The official prompt without the OCR line."""
    return f"{question}\n{INSTRUCTION}"


@dataclass(frozen=True)
class PromptRow:
    """A row of a LLaVA question or answer JSONL.

    Args:
        image_id: The row's ``question_id``, which is the image's.
        prompt: What was or will be asked.
        question: The bare question inside the prompt.
        value: The image's path (question file) or the model's answer (answer file).
    """

    image_id: str
    prompt: str
    question: str
    value: str


def read_asked(path: Path) -> list[PromptRow]:
    """Rows of LLaVA's question JSONL: ``{"question_id": image id, "image", "text": prompt, ...}``.

    Raises:
        DataError: the file is missing; faulty lines are counted and named.
    """
    return _read_rows(path, "text", "image")


def read_answers(path: Path) -> list[PromptRow]:
    """Rows of an answer JSONL of LLaVA or MGM: ``{"question_id": image id, "prompt", "text": answer, ...}``.

    Raises:
        DataError: the file is missing; faulty lines are counted and named.
    """
    return _read_rows(path, "prompt", "text")


def _read_rows(path: Path, prompt_key: str, value_key: str) -> list[PromptRow]:
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}.", advice="Give the path of a JSONL file.") from error
    rows, faults = [], []
    lines = text.split("\n")  # not splitlines(): a question may hold other line separators
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_record(line)
            prompt, value = row[prompt_key], row[value_key]
            if not isinstance(prompt, str) or not isinstance(value, str):
                raise TypeError(f"{prompt_key} and {value_key} must be texts")
            rows.append(PromptRow(str(row["question_id"]), prompt, question_in(prompt), value))
        except KeyError as error:
            faults.append(f"line {number}: {error} is missing")
        except (ValueError, TypeError) as error:
            faults.append(f"line {number}: {error}")
    advice = f"Each line holds question_id (of the image), {prompt_key} and {value_key}."
    refuse(faults, f"{path}: lines that cannot be used (of {len(rows) + len(faults)}):", advice)
    return rows


class TextVqa(Benchmark):
    """TextVQA, scored with M4C accuracy, with or without reference OCR tokens in the prompt (never comparable).

    Args:
        annotations: ``TextVQA_0.5.1_val.json``.
        questions: ``llava_textvqa_val_v051_ocr.jsonl``; None: prompts are made from the annotations, without OCR
            tokens, and images are ``<image_id>.jpg``.
        ocr_tokens: Whether the OCR line of the question file stays in the prompt.
        settings: Batch size and limits.
    """

    name = "textvqa"
    metric_version = "m4c-1"
    sources = (
        Source("annotations", "file", "TextVQA_0.5.1_val.json"),
        # Needed for OCR tokens, which the constructor says.
        Source("questions", "file", "llava_textvqa_val_v051_ocr.jsonl", is_needed=False),
        Source("images", "folder", "the folder train_images"),
    )

    def __init__(
        self, annotations: Path, questions: Path | None, image_root: Path, ocr_tokens: bool, settings: Settings
    ) -> None:
        super().__init__(image_root, settings)
        if ocr_tokens and questions is None:
            raise ConfigError(
                "eval.textvqa.ocr_tokens=true was given without eval.textvqa.questions: the OCR tokens stand in "
                "LLaVA's question file only.",
                advice="Give eval.textvqa.questions=.../llava_textvqa_val_v051_ocr.jsonl, or ocr_tokens=false.",
            )
        self.annotations, self.question_file, self.ocr_tokens = Path(annotations), questions, ocr_tokens
        self.split = "val"

    @classmethod
    def configured(cls, name: str, section: Any, settings: Settings, cache: Path) -> TextVqa:
        questions = Path(section.questions) if section.questions else None
        return cls(Path(section.annotations), questions, Path(section.images), section.ocr_tokens, settings)

    def submission(self, rows: Sequence[Mapping[str, Any]]) -> Submission | None:
        """EvalAI's form for the test split: ``[{"question_id", "answer"}]``."""
        if self.is_scored:
            return None
        answers = [{"question_id": row["question_id"], "answer": normalize_textvqa(row["prediction"])} for row in rows]
        return Submission(f"textvqa_{self.split}_results.json", json.dumps(answers).encode())

    def read(self) -> list[Question]:
        """Questions in the order of the question file, each with the answers and the id of its annotation."""
        self.split, annotations = read_annotations(self.annotations)
        if self.question_file is None:
            return [_asked(a, f"{a.image_id}.jpg", a.question, prompt_without_ocr(a.question)) for a in annotations]
        rows = read_asked(self.question_file)
        return [
            _asked(
                annotation,
                row.value,
                row.question,
                row.prompt if self.ocr_tokens else prompt_without_ocr(row.question),
            )
            for row, annotation in zip(rows, _join(rows, annotations, self.question_file), strict=True)
        ]

    def official_answers(self, path: Path) -> dict[int | str, str]:
        """Answers that the official scripts wrote, by true question id, to be scored here.

        Raises:
            DataError: the file does not answer exactly the questions of the annotation file.
        """
        rows = read_answers(path)
        joined = _join(rows, read_annotations(self.annotations)[1], path)
        return {annotation.question_id: row.value for row, annotation in zip(rows, joined, strict=True)}


def _join(rows: list[PromptRow], annotations: list[Annotation], path: Path) -> list[Annotation]:
    """The annotation of each row; equal questions about one image are matched in their order of appearance."""
    waiting: dict[tuple[str, str], list[Annotation]] = defaultdict(list)
    for annotation in annotations:
        waiting[annotation.image_id, annotation.question.lower()].append(annotation)
    matched, unmatched = [], []
    for row in rows:
        candidates = waiting[row.image_id, row.question.lower()]
        if candidates:
            matched.append(candidates.pop(0))
        else:
            unmatched.append(f"{row.image_id}: {row.question!r}")
    refuse(
        unmatched,
        f"textvqa: questions of {path} that have no annotation (of {len(rows)}):",
        "Both files must be of the same split and version; image id and question text must agree.",
    )
    left = [f"{a.image_id}: {a.question!r}" for group in waiting.values() for a in group]
    refuse(
        left,
        f"textvqa: annotations (of {len(annotations)}) that {path} does not hold:",
        "The file is cut short or of another split; for a quick look use eval.max_questions=N.",
    )
    return matched


def _asked(annotation: Annotation, image: str, question: str, prompt: str) -> Question:
    return Question(
        question_id=annotation.question_id,
        image_id=annotation.image_id,
        image=image,
        question=question,
        prompt=prompt,
        question_type=annotation.question_type or question_type(question),
        answers=annotation.answers,
    )
