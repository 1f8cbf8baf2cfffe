"""Answers of a model to a benchmark: greedy, in batches, each image encoded once, resumable at any point.

Which questions share a batch is decided once, from prompt lengths and images alone: questions about one image follow
each other, and images with prompts of similar length stand together, so that little is padded. A batch whose answers
are on disk is not asked again; a killed evaluation therefore ends with the same bits as one that ran through.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgm_exp.evaluate.benchmarks import Benchmark, Question
from mgm_exp.evaluate.scoreboard import standard_error
from mgm_exp.evaluate.whole_inputs import answer_batches, makes_whole_inputs
from mgm_exp.store import write_atomic, write_json_atomic

if TYPE_CHECKING:
    from torch import Tensor

PREDICTIONS = "predictions.jsonl"
METRICS = "metrics.json"
UNCOUNTED = "uncounted.jsonl"
"""Answers to questions that were asked only because some metric needs them."""
_UNFINISHED = "unfinished.json"
_IMAGE_THREADS = 4

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
Row = dict[str, Any]


@dataclass(frozen=True)
class EvalResult:
    """A finished evaluation.

    Args:
        metrics: ``<benchmark>/accuracy`` and its breakdown.
        eval_key: What must be equal before this result may be compared with another.
        seconds: Time of this call; less than the whole where it continued a killed one.
        n: Questions.
        standard_error: Of the accuracy, clustered by image; None where nothing is scored or there is one image.
        submission: The file for the benchmark's server, below the folder of the evaluation; None: there is none.
    """

    metrics: dict[str, float]
    eval_key: dict[str, Any]
    seconds: float
    n: int
    standard_error: float | None = None
    submission: Path | None = None


@dataclass(frozen=True)
class PlannedBatch:
    """Questions (by place) that are asked together, and the images that no earlier batch needed."""

    questions: tuple[int, ...]
    new_images: tuple[str, ...]


def plan_batches(lengths: Sequence[int], images: Sequence[str], batch_size: int) -> list[PlannedBatch]:
    """Splits questions into batches; every question is in exactly one, every image is new in exactly one.

    Args:
        lengths: Tokens of each prompt.
        images: Image of each question.
        batch_size: Most questions in a batch.
    """
    longest: dict[str, int] = {}
    for image, length in zip(images, lengths, strict=True):
        longest[image] = max(longest.get(image, 0), length)
    order = sorted(range(len(images)), key=lambda i: (longest[images[i]], images[i], lengths[i], i))
    batches, seen = [], set[str]()
    for start in range(0, len(order), batch_size):
        places = tuple(order[start : start + batch_size])
        new = tuple(dict.fromkeys(images[i] for i in places if images[i] not in seen))
        seen.update(new)
        batches.append(PlannedBatch(places, new))
    return batches


def evaluate(
    model: Any,
    processor: Any,
    benchmark: Benchmark,
    out: Path,
    *,
    model_fingerprint: str,
    batch_size: int | None = None,
    max_new_tokens: int | None = None,
    max_questions: int | None = None,
    on_progress: Progress | None = None,
) -> EvalResult:
    """Asks a model all questions of a benchmark and scores the answers.

    Args:
        model: An MGM or a model of transformers, with or without a PEFT adapter, on any device.
        processor: Its processor.
        benchmark: Questions and scorer.
        out: Folder for ``predictions.jsonl`` (one line a question, in the benchmark's order) and ``metrics.json``;
            what an earlier, killed call left there is continued.
        model_fingerprint: Written beside every answer.
        batch_size, max_new_tokens, max_questions: Where given, in place of the benchmark's settings.
        on_progress: Called with (questions answered, all questions) after every batch.

    Raises:
        DataError: a file or an image of the benchmark is missing or broken; it is named, never skipped.
    """
    started = time.monotonic()
    benchmark = benchmark.with_settings(
        batch_size=batch_size, max_new_tokens=max_new_tokens, max_questions=max_questions
    )
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    questions = benchmark.questions
    identity = {
        "eval_key": benchmark.eval_key(),
        "model_fingerprint": model_fingerprint,
        "batch_size": benchmark.settings.batch_size,
    }
    rows = _rows_so_far(out, identity, benchmark, model_fingerprint)
    _answer_the_rest(model, processor, benchmark, out, rows, model_fingerprint, on_progress)
    ordered = benchmark.settle([rows[question.question_id] for question in questions], out)
    metrics = benchmark.summarise(ordered)
    counted = [row for row, question in zip(ordered, questions, strict=True) if benchmark.counts(question)]
    if len(counted) < len(ordered):
        kept = {row["question_id"] for row in counted}
        write_atomic(out / UNCOUNTED, "".join(_line(row) for row in ordered if row["question_id"] not in kept))
    write_atomic(out / PREDICTIONS, "".join(_line(row) for row in counted))
    submission = benchmark.submission(counted)
    if submission is not None:
        write_atomic(out / submission.name, submission.content)
    seconds = time.monotonic() - started
    error = None
    if benchmark.is_scored:
        error = standard_error([row["score"] for row in counted], [row["image_id"] for row in counted])
    result = EvalResult(
        metrics, benchmark.eval_key(), seconds, len(counted), error, out / submission.name if submission else None
    )
    content = {
        "metrics": metrics,
        "eval_key": result.eval_key,
        "seconds": seconds,
        "n": result.n,
        "standard_error": error,
    }
    write_json_atomic(out / METRICS, {**content, "model_fingerprint": model_fingerprint})
    (out / _UNFINISHED).unlink(missing_ok=True)
    return result


# -- what is on disk -------------------------------------------------------------------------------------------------


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _row(question: Question, prediction: str, benchmark: Benchmark, model_fingerprint: str) -> Row:
    return {
        "question_id": question.question_id,
        "image_id": question.image_id,
        "image": question.image,
        "question": question.question,
        "question_type": question.question_type,
        "prompt_hash": question.prompt_hash,
        "prediction": prediction,
        "answers": list(question.answers),
        "score": benchmark.score(prediction, question) if question.answers else None,
        **benchmark.reading(prediction, question),
        "model_fingerprint": model_fingerprint,
    }


def _rows_so_far(out: Path, identity: Mapping[str, Any], benchmark: Benchmark, fingerprint: str) -> dict[Any, Row]:
    """Answers of a killed call with the same model and settings; those of any other are dropped."""
    predictions, note = out / PREDICTIONS, out / _UNFINISHED
    if not note.is_file() or _json(note.read_text(encoding="utf-8")) != identity:
        predictions.unlink(missing_ok=True)
        write_json_atomic(note, dict(identity))
        return {}
    by_id = {question.question_id: question for question in benchmark.questions}
    rows: dict[Any, Row] = {}
    if predictions.is_file():
        for line in predictions.read_bytes().split(b"\n")[:-1]:  # a line without its end was being written
            found = _json(line.decode("utf-8", errors="replace"))
            if not isinstance(found, dict) or not isinstance(found.get("prediction"), str):
                continue
            question = by_id.get(found.get("question_id", ""))
            if question is not None:
                rows[question.question_id] = _row(question, found["prediction"], benchmark, fingerprint)
    # Written whole again: appending behind a torn line would damage the next one.
    write_atomic(predictions, "".join(_line(row) for row in rows.values()))
    return rows


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


# -- asking ----------------------------------------------------------------------------------------------------------


def _answer_the_rest(
    model: Any,
    processor: Any,
    benchmark: Benchmark,
    out: Path,
    rows: dict[Any, Row],
    model_fingerprint: str,
    on_progress: Progress | None,
) -> None:
    """Asks the batches that are not complete in ``rows`` and appends their rows, batch by batch."""
    questions = benchmark.questions
    is_whole = makes_whole_inputs(processor)
    prompts = [] if is_whole else [processor.encode_prompt(question.prompt) for question in questions]
    lengths = [processor.prompt_length(q.prompt) for q in questions] if is_whole else [len(ids) for ids in prompts]
    batches = plan_batches(lengths, [question.image for question in questions], benchmark.settings.batch_size)
    todo = [k for k, batch in enumerate(batches) if any(questions[i].question_id not in rows for i in batch.questions)]
    if on_progress is not None:
        on_progress(len(rows), len(questions))
    if not todo:
        return
    body = model.get_base_model() if hasattr(model, "get_base_model") else model
    was_training = body.training
    body.eval()

    def keep(asked: Sequence[Question], answers: Sequence[str]) -> None:
        for question, answer in zip(asked, answers, strict=True):
            rows[question.question_id] = _row(question, answer, benchmark, model_fingerprint)
            file.write(_line(rows[question.question_id]))
        file.flush()
        if on_progress is not None:
            on_progress(len(rows), len(questions))

    try:
        if is_whole:
            with (out / PREDICTIONS).open("a", encoding="utf-8") as file:
                left = [[questions[i] for i in batches[k].questions] for k in todo]
                answer_batches(body, processor, benchmark, left, keep)
            return
        _warn_of_cut_prompts(body, processor, benchmark, prompts)
        with (
            _Eyes(body, processor, benchmark, batches, todo) as eyes,
            (out / PREDICTIONS).open("a", encoding="utf-8") as file,
        ):
            for k in todo:
                asked = [questions[i] for i in batches[k].questions]
                tokens = eyes.see(k, [question.image for question in asked])
                answers = answer_batch(
                    body,
                    processor,
                    [prompts[i] for i in batches[k].questions],
                    tokens,
                    benchmark.settings.max_new_tokens,
                )
                keep(asked, answers)
    finally:
        body.train(was_training)


def answer_batch(
    model: Any, processor: Any, prompts: Sequence[Sequence[int]], visual_tokens: Tensor, max_new_tokens: int
) -> list[str]:
    """Answers to a batch of prompts. visual_tokens: (B, N, hidden)."""
    import torch

    longest = max(len(ids) for ids in prompts)
    input_ids = torch.full((len(prompts), longest), processor.pad_token_id)
    attention_mask = torch.zeros((len(prompts), longest), dtype=torch.bool)
    for row, ids in enumerate(prompts):  # padded on the left, next to nothing: prompts of a batch are of similar length
        input_ids[row, longest - len(ids) :] = torch.tensor(ids)
        attention_mask[row, longest - len(ids) :] = True
    generated = model.generate(
        input_ids.to(model.device),
        attention_mask.to(model.device),
        visual_tokens=visual_tokens,
        max_new_tokens=max_new_tokens,
        eos_token_id=processor.stop_token_ids,
    )
    return [processor.decode(ids) for ids in generated.cpu()]


def _warn_of_cut_prompts(model: Any, processor: Any, benchmark: Benchmark, prompts: Sequence[Sequence[int]]) -> None:
    limit = getattr(model.config, "tokenizer_model_max_length", None)
    cut = [
        question.question_id
        for question, ids in zip(benchmark.questions, prompts, strict=True)
        if limit and len(ids) - 1 + processor.n_visual_tokens > limit
    ]
    if cut:
        log.warning(
            "%s: %d prompts are longer than the %d tokens the model takes and are cut, as in the official code "
            "(first: question %s)",
            benchmark.name,
            len(cut),
            limit,
            cut[0],
        )


class _Eyes:
    """Visual tokens of the images of each batch: every image is encoded once, together with those new in its batch.

    Questions about one image stand side by side, so only the images of the last two batches are kept.
    """

    def __init__(
        self, model: Any, processor: Any, benchmark: Benchmark, batches: Sequence[PlannedBatch], todo: Sequence[int]
    ) -> None:
        self.model, self.processor, self.benchmark, self.batches = model, processor, benchmark, batches
        self.first_batch = {image: k for k, batch in enumerate(batches) for image in batch.new_images}
        self.upcoming: Iterator[int] = iter(todo)
        self.encoded: dict[int, dict[str, Tensor]] = {}
        self.pending: dict[int, list[Future[tuple[Tensor, Tensor]]]] = {}
        self.pool = ThreadPoolExecutor(_IMAGE_THREADS)

    def __enter__(self) -> _Eyes:
        self._read_ahead()
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)

    def see(self, k: int, images: Sequence[str]) -> Tensor:
        """(B, N, hidden): the tokens of each question's image."""
        import torch

        needed = {self.first_batch[image] for image in images}
        for first in sorted(needed):
            if first not in self.encoded:
                self.encoded[first] = self._encode(first)
        self._read_ahead()
        self.encoded = {first: tokens for first, tokens in self.encoded.items() if first in needed}
        return torch.stack([self.encoded[self.first_batch[image]][image] for image in images])

    def _read_ahead(self) -> None:
        """Decodes the images of the next batch while the model works on this one."""
        k = next(self.upcoming, None)
        if k is not None:
            self._start_reading(k)

    def _start_reading(self, k: int) -> None:
        if k not in self.pending:
            self.pending[k] = [self.pool.submit(self._pixels, image) for image in self.batches[k].new_images]

    def _pixels(self, image: str) -> tuple[Tensor, Tensor]:
        return self.processor.pixels(self.benchmark.picture(image), "pad")

    def _encode(self, k: int) -> dict[str, Tensor]:
        import torch

        self._start_reading(k)
        low, high = zip(*(future.result() for future in self.pending.pop(k)), strict=True)
        tower = next(self.model.model.vision_tower.parameters())
        with torch.inference_mode():
            tokens = self.model.model.encode_images(
                torch.stack(low).to(tower.device, tower.dtype), torch.stack(high).to(tower.device, tower.dtype)
            )
        return dict(zip(self.batches[k].new_images, tokens, strict=True))
