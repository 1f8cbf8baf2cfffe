"""Answers of a model whose processor makes its inputs whole (models of transformers): greedy, in batches.

Images are decoded and processed for each question; a batch's questions are padded on the left and answered together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from mgm_exp.evaluate.benchmarks import Benchmark, Question

if TYPE_CHECKING:
    from PIL.Image import Image

_IMAGE_THREADS = 4


def makes_whole_inputs(processor: Any) -> bool:
    """Whether a processor answers through :func:`answers_of`."""
    from mgm_exp.data.processor import InputsProcessor

    return isinstance(processor, InputsProcessor)


def answers_of(
    model: Any, processor: Any, questions: Sequence[str], pictures: Sequence[Image], max_new_tokens: int
) -> list[str]:
    """Answers to questions that are asked together, each about its picture."""
    import torch

    from mgm_exp.model.hf.loss import model_inputs

    batch = {key: value.to(model.device) for key, value in processor.prompts(questions, pictures).items()}
    asked = batch["input_ids"].shape[1]
    with torch.inference_mode():
        written = model.generate(
            **model_inputs(model, batch),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=processor.stop_token_ids,
            pad_token_id=processor.pad_token_id,
        )
    return [processor.decode(row[asked:]) for row in written.cpu()]


def answer_batches(
    model: Any,
    processor: Any,
    benchmark: Benchmark,
    batches: Sequence[Sequence[Question]],
    keep: Callable[[Sequence[Question], Sequence[str]], None],
) -> None:
    """Asks batch after batch; ``keep`` gets each batch's questions with their answers.

    Raises:
        DataError: an image cannot be read.
    """
    with ThreadPoolExecutor(_IMAGE_THREADS) as pool:

        def read(batch: Sequence[Question]) -> list[Any]:
            images = dict.fromkeys(question.image for question in batch)
            opened = {image: pool.submit(benchmark.picture, image) for image in images}
            return [opened[question.image] for question in batch]

        ahead = read(batches[0]) if batches else []
        for number, batch in enumerate(batches):
            pictures = [future.result() for future in ahead]
            ahead = read(batches[number + 1]) if number + 1 < len(batches) else []
            prompts = [question.prompt for question in batch]
            keep(batch, answers_of(model, processor, prompts, pictures, benchmark.settings.max_new_tokens))
