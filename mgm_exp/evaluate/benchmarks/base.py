"""What every benchmark has in common: questions from the user's files, a score for one answer, a key for the result."""

from __future__ import annotations

import copy
import hashlib
import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mgm_exp.errors import DataError
from mgm_exp.evaluate.metrics import anls, textvqa_accuracy

if TYPE_CHECKING:
    from PIL.Image import Image

    from mgm_exp.evaluate.corruptions import Corruption
    from mgm_exp.evaluate.judge import Judge

_NAMED = 5
"""Faults that an error message names before it only counts."""


@dataclass(frozen=True)
class Question:
    """One question of a benchmark.

    Args:
        question_id: Unique in the benchmark.
        image_id: The image's own name; several questions may share an image.
        image: Path of the image below the benchmark's ``image_root``.
        question: The bare question.
        prompt: What the model is asked: the question with all that the benchmark puts around it, no chat template.
        question_type: For the breakdown.
        answers: Reference answers; none where they are not public and a server scores.
        choices: Letter -> text of each option of a multiple-choice question.
        tags: What else a benchmark's summary needs to know of the question.
    """

    question_id: int | str
    image_id: str
    image: str
    question: str
    prompt: str
    question_type: str
    answers: tuple[str, ...] = field(repr=False)
    choices: Mapping[str, str] = field(default_factory=dict, repr=False)
    tags: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def prompt_hash(self) -> str:
        """First 16 hex digits of the prompt's SHA-256."""
        return hashlib.sha256(self.prompt.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Settings:
    """How a benchmark is run.

    Args:
        batch_size: Questions in one forward pass.
        max_new_tokens: Longest answer, in tokens.
        max_questions: Only the first N questions; None: all.
        max_megapixels: Images above it are refused before they are decoded.
        judge: Reads options out of answers that the rules cannot read; None: they stay unread.
        corruption: Done to every image before the model sees it; None: images as they are.
    """

    batch_size: int = 8
    max_new_tokens: int = 128
    max_questions: int | None = None
    max_megapixels: float = 50.0
    judge: Judge | None = None
    corruption: Corruption | None = None


@dataclass(frozen=True)
class Source:
    """A file or folder that a benchmark is read from.

    Args:
        key: The key below ``eval.<benchmark>`` that says where it is.
        kind: What must be there.
        what: What it is called where it is downloaded.
        is_needed: Whether the benchmark cannot be run without it.
    """

    key: str
    kind: Literal["file", "folder", "file or folder"]
    what: str
    is_needed: bool = True


@dataclass(frozen=True)
class Submission:
    """A file for the server that scores where answers are not public.

    Args:
        name: Its name, with the suffix that the server expects.
        content: Its bytes.
    """

    name: str
    content: bytes = field(repr=False)


class Benchmark(ABC):
    """Questions, images and a scorer. A benchmark is one file that says where its questions come from.

    Args:
        image_root: Folder that the questions' image paths are relative to.
        settings: Batch size and limits.

    Example:
        >>> benchmark = load_benchmark("textvqa", config)
        >>> question = benchmark.questions[0]
        >>> benchmark.score("nokia", question)
        1.0
    """

    name: str
    split: str
    metric_version: str
    ocr_tokens: bool = False
    sources: ClassVar[tuple[Source, ...]] = ()
    _words: Mapping[str, str] | None = None
    """Question id -> other words that it is asked in; None: the file's own."""

    def __init__(self, image_root: Path, settings: Settings) -> None:
        self.image_root = Path(image_root)
        self.settings = settings
        self._hashes: dict[str, str] = {}  # of image files; variants of the benchmark share them

    @classmethod
    @abstractmethod
    def configured(cls, name: str, section: Any, settings: Settings, cache: Path) -> Benchmark:
        """The benchmark of a section of the configuration, all of whose needed sources are there.

        Args:
            name: The benchmark's.
            section: ``eval.<name>``.
            settings: Batch size and limits.
            cache: Folder for images that lie inside a table; of the demo: that of the generated data.
        """

    @classmethod
    def needs(cls, section: Any) -> tuple[Source, ...]:
        """:attr:`sources`, as this section needs them."""
        return cls.sources

    def with_settings(self, **changes: int | float | None) -> Benchmark:
        """The same benchmark with other settings; changes that are None are left out."""
        changed = copy.copy(self)
        changed.settings = replace(self.settings, **{k: v for k, v in changes.items() if v is not None})  # type: ignore
        if changed.settings.max_questions != self.settings.max_questions:
            changed._forget_questions()
        return changed

    def corrupted(self, corruption: Corruption) -> Benchmark:
        """The same questions about corrupted images, as a benchmark of its own name."""
        changed = copy.copy(self)
        changed.settings = replace(self.settings, corruption=corruption)
        changed.name = f"{self.name}.{corruption}"
        return changed

    def rephrased(self, texts: Mapping[str, str]) -> Benchmark:
        """The same questions in other words, as a benchmark of its own name.

        Args:
            texts: Question id (as a text) -> the other words. Questions that are not there are left out.

        Raises:
            DataError: an id is none of the benchmark's, or a prompt does not hold its question.
        """
        by_id = {str(question.question_id): question for question in self.questions}
        is_all = self.settings.max_questions is None  # else the others were left out on purpose
        refuse(
            [name for name in texts if is_all and name not in by_id],
            f"{self.name}: rephrased questions whose question_id is none of the benchmark's:",
            "Take the ids from predictions/<benchmark>.jsonl.",
        )
        asked = [by_id[name] for name in by_id if name in texts]
        refuse(
            [q.question_id for q in asked if q.question not in q.prompt],
            f"{self.name}: questions that do not stand in their prompt and cannot be rephrased:",
            "Leave them out.",
        )
        changed = copy.copy(self)
        changed.name = f"{self.name}.rephrased"
        changed._words = dict(texts)
        changed._forget_questions()
        return changed

    def _forget_questions(self) -> None:
        for derived in ("questions", "by_id"):
            self.__dict__.pop(derived, None)

    @abstractmethod
    def read(self) -> list[Question]:
        """All questions, in the order of the benchmark's file.

        Raises:
            DataError: a file, a row, a join or an image is missing or wrong; faults are counted and named.
        """

    @cached_property
    def questions(self) -> list[Question]:
        """The questions that are asked, in the order of the benchmark's file; every image file is there.

        Raises:
            DataError: see :meth:`read`.
        """
        questions = self.read()
        if not questions:
            raise DataError(f"{self.name}: its files hold no question.", advice="Are they of the right split?")
        seen: dict[int | str, Question] = {}
        repeated = [q.question_id for q in questions if seen.setdefault(q.question_id, q) is not q]
        refuse(repeated, f"{self.name}: question_id is not unique:", "Every question needs an id of its own.")
        if self.settings.max_questions is not None:
            questions = self.first(questions, self.settings.max_questions)
        if self._words is not None:
            asked = [question for question in questions if str(question.question_id) in self._words]
            questions = [_in_other_words(question, self._words[str(question.question_id)]) for question in asked]
        faults = [fault for image in sorted({q.image for q in questions}) if (fault := self._fault(image))]
        refuse(
            faults,
            f"{self.name}: images that cannot be found in {self.image_root}:",
            "Give the folder that holds them; a question without its image is never skipped.",
        )
        return questions

    def _fault(self, image: str) -> str | None:
        from mgm_exp.data.images import ImageFault, locate

        try:
            return None if locate(self.image_root, image).is_file() else image
        except ImageFault as fault:
            return f"{image}: {fault.kind}"

    def first(self, questions: list[Question], n: int) -> list[Question]:
        """The first n questions, with whatever is needed to score them."""
        return questions[:n]

    @property
    def is_scored(self) -> bool:
        """Whether the answers are public; where they are not, a server scores the submission file."""
        return any(question.answers for question in self.questions)

    @cached_property
    def by_id(self) -> dict[int | str, Question]:
        """The questions by their id."""
        return {question.question_id: question for question in self.questions}

    def picture(self, image: str) -> Image:
        """An image of the benchmark as 8-bit RGB, corrupted where the settings say so.

        Raises:
            DataError: it cannot be read; it is named.
        """
        from mgm_exp.data.images import ImageFault, open_image

        corruption = self.settings.corruption
        try:
            picture = open_image(self.image_root, image, self.settings.max_megapixels)
            return picture if corruption is None else corruption.apply(picture, image)
        except ImageFault as fault:
            raise DataError(
                f"{self.name}: image {image} in {self.image_root} cannot be used: {fault}",
                advice="Replace the file; an evaluation never skips a question.",
            ) from fault

    def counts(self, question: Question) -> bool:
        """Whether a question is one of the benchmark's; others are asked only because some metric needs them."""
        return True

    def score(self, prediction: str, question: Question) -> float:
        """Score of one answer in 0..1; the benchmark's accuracy is the mean over its questions."""
        return textvqa_accuracy(prediction, question.answers)

    def reading(self, prediction: str, question: Question) -> dict[str, Any]:
        """What was read from an answer, kept beside its score."""
        return {}

    def settle(self, rows: list[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
        """The rows of all questions after whatever can only be done when all are answered.

        Args:
            rows: In the benchmark's order.
            out: Folder of the evaluation, for what should survive an interruption.
        """
        return rows

    def summarise(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Metrics of a finished evaluation.

        Args:
            rows: The lines of ``predictions.jsonl``, and those of questions that do not count.

        Returns:
            ``<name>/accuracy`` (mean score), ``<name>/accuracy[<type>]`` for each question type, and what
            :meth:`further` gives. Where answers are not public, only ``<name>/answered``, their number.
        """
        if not self.is_scored:
            return {f"{self.name}/answered": float(len(rows))}
        by_type: dict[str, list[float]] = defaultdict(list)
        for row in rows:
            question = self.by_id.get(row.get("question_id", ""))
            if question is None or self.counts(question):
                by_type[row["question_type"]].append(row["score"])
        metrics = {f"{self.name}/accuracy": mean(score for scores in by_type.values() for score in scores)}
        for kind in sorted(by_type):
            metrics[f"{self.name}/accuracy[{kind}]"] = mean(by_type[kind])
        return metrics | {f"{self.name}/{name}": value for name, value in self.further(rows).items()}

    def further(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """More metrics of scored rows, by name without the benchmark's.

        Here ``anls``: a softer measure, which still moves where one wrong letter makes an answer worth nothing.
        """
        return {"anls": mean(anls(row["prediction"], row["answers"]) for row in rows)}

    def submission(self, rows: Sequence[Mapping[str, Any]]) -> Submission | None:
        """The file for the benchmark's server, where it has one."""
        return None

    def eval_key(self) -> dict[str, Any]:
        """What must be equal before two results may be compared."""
        prompts = hashlib.sha256()
        counted = [question for question in self.questions if self.counts(question)]
        for question in sorted(counted, key=lambda q: str(q.question_id)):
            prompts.update(f"{question.question_id}\0{question.prompt}\0".encode())
        key = {
            "split": self.split,
            "prompt_hash": prompts.hexdigest()[:16],
            "n": len(counted),
            "ocr_tokens": self.ocr_tokens,
            "metric_version": self.metric_version,
            "max_new_tokens": self.settings.max_new_tokens,
        }
        corruption = self.settings.corruption
        return key if corruption is None else key | {"corruption": f"{corruption} v{corruption.version}"}

    def files(self) -> list[Path]:
        """Files that a metric depends on beyond the questions and their answers."""
        return []

    def fingerprint(self) -> str:
        """SHA-256 of everything that the result depends on, apart from the model: questions, images, decoding."""
        from mgm_exp.store import file_sha256, fingerprint

        images = sorted({q.image for q in self.questions})
        for image in images:
            if image not in self._hashes:
                self._hashes[image] = file_sha256(self.image_root / image)
        return fingerprint(
            {
                "benchmark": self.name,
                "eval_key": self.eval_key(),
                "questions": [
                    [q.question_id, q.image, q.question_type, q.prompt_hash, list(q.answers), _marks(q)]
                    for q in self.questions
                ],
                "files": [file_sha256(file) for file in self.files()],
                "images": {image: self._hashes[image] for image in images},
                "batch_size": self.settings.batch_size,
            }
        )


def _in_other_words(question: Question, text: str) -> Question:
    return replace(question, question=text, prompt=question.prompt.replace(question.question, text, 1))


def _marks(question: Question) -> list[list[str]]:
    return sorted([*map(list, question.choices.items()), *map(list, question.tags.items())])


def mean(values: Iterable[float]) -> float:
    """Mean of scores; the order of the rows does not matter to the last bit."""
    numbers = list(values)
    return math.fsum(numbers) / len(numbers)


def refuse(faults: Sequence[Any], what: str, advice: str) -> None:
    """Raises a DataError that counts the faults and names the first ones; does nothing where there is none."""
    if faults:
        named = ", ".join(str(fault) for fault in faults[:_NAMED])
        more = f", and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
        raise DataError(f"{what} {len(faults)} ({named}{more}).", advice=advice)
