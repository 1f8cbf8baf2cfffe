"""What the data room asks of a model's processor, and how much of a sample is learnt.

The processor itself belongs to the model room and is passed in: data never imports a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

IGNORE_INDEX = -100
"""Label of a token that is not learnt."""
IMAGE_TOKEN_INDEX = -200
"""Stands in ``input_ids`` once for each image and is replaced by ``n_visual_tokens`` embeddings."""


class Processor(Protocol):
    """Text to ids and labels, images to pixels; ``mgm_exp.model.load_processor`` gives one."""

    model_max_length: int

    @property
    def n_visual_tokens(self) -> int: ...

    @property
    def pad_token_id(self) -> int: ...

    def encode(self, conversations: Sequence[Mapping[str, str]], has_image: bool = True) -> Mapping[str, list[int]]: ...

    def pixels(self, image: Image.Image, aspect: str = "pad") -> tuple[Any, Any]: ...

    def no_pixels(self) -> tuple[Any, Any]: ...

    def square(self, image: Image.Image, aspect: str = "pad") -> Any: ...

    def detail(self, square: Any) -> Any: ...

    def low(self, image_aux: Any) -> Any: ...


@runtime_checkable
class InputsProcessor(Protocol):
    """A processor that makes all of a model's inputs at once, whatever they are called: those of transformers.

    How many tokens an image becomes may depend on its size. ``inputs`` and ``measure`` raise
    :class:`mgm_exp.errors.UnusableRow` for a row that the model cannot take.
    """

    model_max_length: int

    def inputs(self, turns: Sequence[Mapping[str, str]], image: Image.Image | None) -> dict[str, Tensor]: ...

    def measure(self, turns: Sequence[Mapping[str, str]], size: tuple[int, int] | None) -> tuple[int, int, bool]: ...

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]: ...


def merged_length(input_ids: Sequence[int], n_visual: int) -> int:
    """Length of a sample after each image placeholder has become ``n_visual`` embeddings, before truncation."""
    return len(input_ids) + sum(i == IMAGE_TOKEN_INDEX for i in input_ids) * (n_visual - 1)


def supervised_tokens(input_ids: Sequence[int], labels: Sequence[int], n_visual: int, max_length: int) -> int:
    """Tokens of one sample that the loss is taken over.

    Counted as the model does: images inserted, the merged sequence cut to ``max_length``, labels shifted by one (the
    first position is predicted by nothing).

    Args:
        input_ids, labels: As ``Processor.encode`` gives them, equally long.
        n_visual: Embeddings of one image.
        max_length: Longest merged sequence.
    """
    count = position = 0
    for token, label in zip(input_ids, labels, strict=True):
        if position >= max_length:
            break
        if token == IMAGE_TOKEN_INDEX:
            position += n_visual
            continue
        if label != IGNORE_INDEX and position > 0:
            count += 1
        position += 1
    return count
