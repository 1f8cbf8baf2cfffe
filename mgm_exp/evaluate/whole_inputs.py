"""Answers of a model whose processor makes its inputs whole (models of transformers): greedy, in batches.

Images are processed for each question; a batch's questions are padded on the left and answered together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mgm_exp.errors import UserError
from mgm_exp.evaluate.answerer import MgmAnswerer

if TYPE_CHECKING:
    from PIL.Image import Image


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


class WholePrompt(list[int]):
    """A question of a known length whose tokens are made together with its image; the numbers in it say nothing."""

    def __init__(self, length: int = 0, text: str = "") -> None:
        super().__init__([0] * length)
        self.text = text


class WholeAnswerer:
    """A model of transformers and its processor; see :class:`mgm_exp.evaluate.answerer.Answerer`.

    What it sees of an image is the picture itself: towers run with the rest of the model, anew for each question.
    """

    eyes = "pictures"
    towers = ()

    def __init__(self, model: Any, processor: Any) -> None:
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.processor = processor

    def encode_prompt(self, question: str, has_image: bool = True) -> list[int]:
        return prompt_encoder(self.processor)(question)

    def pixels(self, picture: Image) -> Any:
        return (picture,)

    def see(self, pixels: Sequence[Any]) -> list[Any]:
        return [picture for (picture,) in pixels]

    def answer(self, prompts: Sequence[Any], seen: Sequence[Any], max_new_tokens: int) -> list[str]:
        if any(picture is None for picture in seen):
            raise UserError(
                "A question without an image was asked of a model of transformers.",
                advice="Ask it about images only; questions without one can be asked of MGM.",
            )
        return answers_of(self.model, self.processor, [prompt.text for prompt in prompts], seen, max_new_tokens)


def prompt_encoder(processor: Any) -> Callable[[str], list[int]]:
    """How a question becomes a prompt, by either kind of processor."""
    if makes_whole_inputs(processor):
        return lambda question: WholePrompt(processor.prompt_length(question), question)
    encode: Callable[[str], list[int]] = processor.encode_prompt
    return encode


def answerer_of(model: Any, processor: Any) -> MgmAnswerer | WholeAnswerer:
    """A model in evaluation mode, as generation asks it."""
    return WholeAnswerer(model, processor) if makes_whole_inputs(processor) else MgmAnswerer(model, processor)
