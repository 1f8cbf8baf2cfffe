"""What all captioners that are models have in common: batches, greedy or seeded writing, and looking only once.

Greedy and batched, so equal images give equal captions in any batch size up to rounding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mgm_exp.config import CaptionerConfig

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class CaptionSettings:
    """How captions are written.

    Args:
        prompt: What the captioner is asked; None: its own way of asking for a caption.
        max_new_tokens: Most tokens of a caption or an answer.
        batch_size: Images in one forward pass; larger is faster until memory is full.
        precision: auto (bf16 on a GPU, fp32 on the CPU), fp32, bf16, fp16 or int8.
        temperature, top_p: Of sampled captions.
    """

    prompt: str | None = None
    max_new_tokens: int = 40
    batch_size: int = 32
    precision: str = "auto"
    temperature: float = 1.0
    top_p: float = 0.9

    @classmethod
    def of_section(cls, section: CaptionerConfig) -> CaptionSettings:
        """The settings that ``data.captioner`` describes."""
        return cls(
            section.prompt,
            section.max_new_tokens,
            section.batch_size,
            section.precision.value,
            section.temperature,
            section.top_p,
        )


class ModelCaptioner(ABC):
    """Base of the captioners. A kind of model says how it looks at images and how it writes about them.

    Args:
        settings: How captions are written.

    Attributes:
        name: What it calls itself in messages and provenance records.
        device: Where it runs.
        can_answer: Whether it can be asked questions.
    """

    name: str
    device: str
    can_answer: bool = True

    def __init__(self, settings: CaptionSettings) -> None:
        self.settings = settings
        self._last: tuple[tuple[Image.Image, ...], str | None, Any] | None = None

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of the weights."""

    @abstractmethod
    def _see(self, images: tuple[Image.Image, ...], prompt: str | None) -> Any:
        """Whatever can be computed of RGB images before a word is written; kept for the next call with the same."""

    @abstractmethod
    def _write(self, seen: Any, prompt: str | None, **generate: Any) -> list[str]:
        """A text for each image, without the prompt. `generate`: settings of transformers' method of this name."""

    def _question(self, question: str) -> str:
        """The prompt that puts a question."""
        return question

    def caption(
        self, images: Sequence[Image.Image], batch_size: int | None = None, *, seeds: Sequence[int] | None = None
    ) -> list[str]:
        """One caption on one line for each image, in order.

        Args:
            images: any size and mode; converted to RGB and resized by the model's own image processor.
            batch_size: images in one forward pass; None: as in the settings.
            seeds: one for each image: captions are sampled, each from its own seed, whatever is beside it. None:
                greedy.
        """
        return self._describe(images, self.settings.prompt, batch_size or self.settings.batch_size, seeds)

    def answer(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
        """The greedy answer to one question about each image."""
        answers = [""] * len(images)
        for question in dict.fromkeys(questions):  # one length in a batch: nothing is padded
            places = [k for k, asked in enumerate(questions) if asked == question]
            texts = self._describe(
                [images[k] for k in places], self._question(question), self.settings.batch_size, None
            )
            for place, text in zip(places, texts, strict=True):
                answers[place] = text
        return answers

    def _describe(
        self, images: Sequence[Image.Image], prompt: str | None, batch_size: int, seeds: Sequence[int] | None
    ) -> list[str]:
        import torch

        texts: list[str] = []
        for start in range(0, len(images), batch_size):
            part = slice(start, start + batch_size)
            generate = self._generation(None if seeds is None else seeds[part])
            with torch.inference_mode():
                texts += self._write(self._seen(tuple(images[part]), prompt), prompt, **generate)
        return [" ".join(text.split()) for text in texts]

    def _seen(self, images: tuple[Image.Image, ...], prompt: str | None) -> Any:
        if self._last is not None:
            before, asked, seen = self._last
            if asked == prompt and len(before) == len(images) and all(map(lambda a, b: a is b, before, images)):
                return seen
        seen = self._see(tuple(image.convert("RGB") for image in images), prompt)
        self._last = (images, prompt, seen)
        return seen

    def _generation(self, seeds: Sequence[int] | None) -> dict[str, Any]:
        steps = self.settings.max_new_tokens
        generate: dict[str, Any] = {"do_sample": False, "num_beams": 1, "max_new_tokens": steps}
        if seeds is not None:
            from transformers import LogitsProcessorList

            from mgm_exp.data.captioner.sampling import SeededSampling

            settings = self.settings
            sampling = SeededSampling(seeds, temperature=settings.temperature, top_p=settings.top_p, steps=steps)
            generate["logits_processor"] = LogitsProcessorList([sampling])
        return generate
