"""Questions that are answered together get the answers that each gets alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mgm_exp.evaluate.whole_inputs import answers_of
from mgm_exp.model.hf.loading import build_hf, open_processor

from .conftest import FAMILIES, picture


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_of_a_batch_are_those_of_each_question_alone(family: str, folder_of: Callable[[str], Path]) -> None:
    model, _ = build_hf({"path": str(folder_of(family))}, device="cpu", dtype=None)
    with torch.no_grad():
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if ".language_model.layers." in name and parameter.dim() > 1:
                parameter.normal_(std=0.5)  # far from ties, and from repeating what was read last
    processor = open_processor(folder_of(family))
    questions = ["What is it?", "What colour is the blue door, said the man?", "red or green?"]
    images = [picture(), picture(40, 80, (20, 200, 30)), picture(64, 64, (0, 0, 90))]
    processor.decode = lambda ids: ids.tolist()  # also of tokens that have no text
    together = answers_of(model, processor, questions, images, 8)
    alone = [answers_of(model, processor, [q], [i], 8)[0] for q, i in zip(questions, images, strict=True)]
    ends = [processor.stop_token_ids[0], processor.pad_token_id]
    assert [row[: len(one)] for row, one in zip(together, alone, strict=True)] == alone
    assert all(set(row[len(one) :]) <= set(ends) for row, one in zip(together, alone, strict=True))
    assert len({tuple(row) for row in together}) > 1


def test_a_folder_that_samples_answers_greedily(
    folder_of: Callable[[str], Path], processor_of: Callable[..., Any]
) -> None:
    model, _ = build_hf({"path": str(folder_of("qwen2_vl"))}, device="cpu", dtype=None)
    assert model.generation_config.do_sample is False
    assert model.generation_config.repetition_penalty in (None, 1.0)
    first, second = (answers_of(model, processor_of("qwen2_vl"), ["What is it?"], [picture()], 8) for _ in range(2))
    assert first == second


def test_the_generator_answers_about_images_in_the_order_of_its_questions(folder_of: Callable[[str], Path]) -> None:
    from mgm_exp.errors import UserError
    from mgm_exp.evaluate import Generator

    model, _ = build_hf({"path": str(folder_of("llava"))}, device="cpu", dtype=None)
    processor = open_processor(folder_of("llava"))
    processor.decode = lambda ids: str(ids.tolist())
    questions = ["What colour is the blue door, said the man?", "What is it?"]
    images = [picture(), picture(40, 80, (20, 200, 30))]
    generator = Generator(model, processor, batch_size=1)
    alone = [answers_of(model, processor, [q], [i], 4)[0] for q, i in zip(questions, images, strict=True)]
    assert generator.answers(questions, images, max_new_tokens=4) == alone
    with pytest.raises(UserError, match="without an image"):
        generator.answers(questions, [images[0], None], max_new_tokens=4)
