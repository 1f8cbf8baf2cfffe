"""The evaluate stage: a benchmark on the base, on an aligned connector, or on what the instruct stage made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mgm_exp.config import ExperimentConfig, Precision
from mgm_exp.evaluate.benchmarks import Benchmark

DTYPE = {Precision.fp32: "float32", Precision.bf16: "bfloat16", Precision.fp16: "float16"}


def evaluate_weights(
    config: ExperimentConfig,
    benchmark: Benchmark,
    weights: Path | None,
    out: Path,
    *,
    device: str,
    model_fingerprint: str,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Answers and scores all questions with one model; for more of either see :class:`~mgm_exp.evaluate.Examiner`.

    Args:
        config: Its ``model`` section describes the base.
        benchmark: Questions and scorer.
        weights: Output of an align stage (``connector.safetensors``) or of an instruct stage (``adapter/`` or
            ``model/``); None: the base as it is.
        out: Gets ``predictions.jsonl`` and ``metrics.json``; a killed call continues in it.
        device: ``cpu`` or ``cuda``.
        model_fingerprint: Written beside every answer.
        on_progress: Called with (answered, all).

    Returns:
        ``{"metrics", "eval_key", "n", "standard_error", "submission"}``; the last is a file name in ``out``, or None.
    """
    from mgm_exp.evaluate.examiner import Examiner
    from mgm_exp.evaluate.generate import Candidate

    with Examiner(config, device) as examiner:
        candidate = Candidate(model_fingerprint, out)
        return examiner.examine(benchmark, {candidate: weights}, on_progress)[0]


def load_weights(config: ExperimentConfig, weights: Path | None, device: str) -> tuple[Any, Any]:
    """The model in evaluation mode, with its processor."""
    from mgm_exp.model import family_of

    family = family_of(config.model)
    dtype = DTYPE[config.eval.precision or config.train.precision]
    section, is_merged = family.trained_section(config.model, weights), config.eval.merge_adapter
    model = family.load_trained(section, weights, device=device, dtype=dtype, is_merged=is_merged)
    family.set_max_length(model, config.train.max_length)
    return model, processor_for(config, weights)


def processor_for(config: ExperimentConfig, weights: Path | None) -> Any:
    """The processor of these weights; reads no tensors."""
    from mgm_exp.model import family_of

    family = family_of(config.model)
    return family.processor(family.trained_section(config.model, weights), config.train.max_length)


def question_only_accuracy(benchmark: Benchmark, records: Path) -> float:
    """Score of a guesser that never sees an image: the most frequent training answer to the same question text.

    Args:
        benchmark: Its questions are answered.
        records: ``instruct.jsonl`` of the curate stage. A question that does not occur there is answered with the most
            frequent answer of all.
    """
    from mgm_exp.evaluate.question_only import score_guesses

    rows = [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines()]
    return score_guesses(benchmark, rows).metrics[f"{benchmark.name}/accuracy"]
