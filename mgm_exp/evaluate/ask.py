"""One question about one image, answered as the questions of a benchmark are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mgm_exp.evaluate.whole_inputs import answers_of, makes_whole_inputs

if TYPE_CHECKING:
    from PIL.Image import Image


def ask(model: Any, processor: Any, picture: Image, question: str, max_new_tokens: int) -> str:
    """The model's answer: greedy, up to the end of its turn.

    Args:
        model: An MGM in evaluation mode, with or without an adapter.
        processor: Its processor.
        picture: 8-bit RGB (``mgm_exp.data.images.open_image``).
        question: As it is put to the model, without chat template and image placeholder.
        max_new_tokens: Longest answer, in tokens.
    """
    import torch

    from mgm_exp.evaluate.generate import answer_batch

    body = model.get_base_model() if hasattr(model, "get_base_model") else model
    if makes_whole_inputs(processor):
        return answers_of(body, processor, [question], [picture], max_new_tokens)[0]
    low, high = processor.pixels(picture, "pad")
    tower = next(body.model.vision_tower.parameters())
    with torch.inference_mode():
        seen = body.model.encode_images(
            low[None].to(tower.device, tower.dtype), high[None].to(tower.device, tower.dtype)
        )  # (1, N, hidden)
    return answer_batch(body, processor, [processor.encode_prompt(question)], seen, max_new_tokens)[0]
