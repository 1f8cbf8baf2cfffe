"""A benchmark from its questions to its scores: asked in batches, resumable at any point.

Which questions share a batch is decided once (:mod:`mgm_exp.evaluate.batches`); the answers of a batch are appended to
a partial file as soon as they are there. A batch whose answers are on disk is not asked again; a killed evaluation
therefore ends with the same bits as one that ran through.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgm_exp.evaluate.answerer import MgmAnswerer
from mgm_exp.evaluate.batches import PLAN_VERSION, PlannedBatch, plan_batches
from mgm_exp.evaluate.benchmarks import Benchmark, Question
from mgm_exp.evaluate.partial import PARTIAL, PartialAnswers
from mgm_exp.evaluate.passes import Fits, OnAnswers, Plan, one_pass
from mgm_exp.evaluate.scoreboard import standard_error
from mgm_exp.evaluate.whole_inputs import answerer_of, makes_whole_inputs, prompt_encoder
from mgm_exp.store import write_atomic, write_json_atomic

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Candidate", "EvalResult", "PlannedBatch", "answer_batch", "evaluate", "evaluate_together", "plan_batches"]

PREDICTIONS = "predictions.jsonl"
METRICS = "metrics.json"
UNCOUNTED = "uncounted.jsonl"
"""Answers to questions that were asked only because some metric needs them."""

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
Row = dict[str, Any]
Ask = Callable[[Plan, Sequence[Sequence[int]], OnAnswers], None]
"""Asks batches of a plan: (plan, batches that each model is still to be asked, takes the answers)."""


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
class Candidate:
    """A model whose answers to a benchmark are wanted.

    Args:
        fingerprint: Of the model; written beside every answer.
        out: Folder for ``predictions.jsonl`` (one line a question, in the benchmark's order) and ``metrics.json``.
        partial: File of the answers so far, which a later call continues and its owner deletes; None: one in ``out``,
            which goes when all are there.
    """

    fingerprint: str
    out: Path
    partial: Path | None = None


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
    benchmark = benchmark.with_settings(
        batch_size=batch_size, max_new_tokens=max_new_tokens, max_questions=max_questions
    )
    answerer, fits = answerer_of(model, processor), Fits()
    was_training = answerer.model.training

    def ask(plan: Plan, todo: Sequence[Sequence[int]], on_answers: OnAnswers) -> None:
        one_pass(benchmark, plan, [answerer], todo, on_answers, fits=fits)

    answerer.model.eval()
    try:
        candidate = Candidate(model_fingerprint, Path(out))
        (result,) = evaluate_together(benchmark, processor, [candidate], ask, on_progress=on_progress)
        return result
    finally:
        answerer.model.train(was_training)


def evaluate_together(
    benchmark: Benchmark,
    processor: Any,
    candidates: Sequence[Candidate],
    ask: Ask,
    *,
    on_progress: Progress | None = None,
) -> list[EvalResult]:
    """Answers of several models to one benchmark, each as if it were alone.

    Args:
        benchmark: Questions and scorer.
        processor: Of the base that all of them share.
        candidates: The models.
        ask: Has the batches answered that are still to be asked.
        on_progress: Called with (questions answered, all questions of all models) after every batch.
    """
    started = time.monotonic()
    plan = Plan.of(benchmark, prompt_encoder(processor))
    questions = benchmark.questions
    if not makes_whole_inputs(processor):
        _warn_of_cut_prompts(processor, benchmark, plan.prompts)
    with ExitStack() as stack:
        partials = []
        for candidate in candidates:
            candidate.out.mkdir(parents=True, exist_ok=True)
            ids = [[questions[place].question_id for place in places] for places in plan.places]
            path = candidate.partial or candidate.out / PARTIAL
            partials.append(stack.enter_context(PartialAnswers(path, _owner(benchmark, candidate), ids)))
        todo = [[k for k in range(len(plan.batches)) if k not in partial.batches] for partial in partials]
        total = len(questions) * len(candidates)
        answered = total - sum(len(plan.places[k]) for batches in todo for k in batches)
        if on_progress is not None:
            on_progress(answered, total)

        def on_answers(model: int, batch: int, answers: list[str]) -> None:
            nonlocal answered
            partials[model].add(batch, answers)
            answered += len(answers)
            if on_progress is not None:
                on_progress(answered, total)

        if any(todo):
            ask(plan, todo, on_answers)
    found = []
    for candidate, partial in zip(candidates, partials, strict=True):
        found.append(_score(benchmark, plan, candidate, partial, started))
        if candidate.partial is None:
            partial.path.unlink(missing_ok=True)
    return found


def _owner(benchmark: Benchmark, candidate: Candidate) -> dict[str, Any]:
    """What answers belong to: model, questions with their images, and all that decides who is asked together."""
    from mgm_exp.store import fingerprint

    return {
        "model": candidate.fingerprint,
        "eval_key": benchmark.eval_key(),
        "questions": fingerprint([[q.question_id, q.image, q.prompt_hash] for q in benchmark.questions]),
        "batch_size": benchmark.settings.batch_size,
        "plan": PLAN_VERSION,
    }


def _score(
    benchmark: Benchmark, plan: Plan, candidate: Candidate, partial: PartialAnswers, started: float
) -> EvalResult:
    """Writes the rows of all questions, their metrics and, where there is a server, the file for it."""
    out, questions = candidate.out, benchmark.questions
    said = {p: a for k, places in enumerate(plan.places) for p, a in zip(places, partial.batches[k], strict=True)}
    rows = [_row(question, said[place], benchmark, candidate.fingerprint) for place, question in enumerate(questions)]
    ordered = benchmark.settle(rows, out)
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
    write_json_atomic(out / METRICS, {**content, "model_fingerprint": candidate.fingerprint})
    return result


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


def answer_batch(
    model: Any, processor: Any, prompts: Sequence[Sequence[int]], visual_tokens: Tensor, max_new_tokens: int
) -> list[str]:
    """Answers to a batch of prompts, by a model in evaluation mode. visual_tokens: (B, N, hidden)."""
    return MgmAnswerer(model, processor).answer(prompts, list(visual_tokens), max_new_tokens)


def _warn_of_cut_prompts(processor: Any, benchmark: Benchmark, prompts: Sequence[Sequence[int]]) -> None:
    limit = processor.model_max_length
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
