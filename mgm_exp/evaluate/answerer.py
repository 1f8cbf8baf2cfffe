"""What generation needs to know of a model, and nothing else of it: here for MGM.

Another family of models takes part in batched, resumable, sharded evaluation by a class with these few members;
everything above it (order, batches, image cache, partial files, processes) is the same for all.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from mgm_exp.evaluate.greedy import greedy

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

Pixels = tuple["Tensor", ...]


class Answerer(Protocol):
    """A model in evaluation mode that answers questions about images."""

    @property
    def eyes(self) -> str:
        """Equal for answerers of one process that see the same in every image."""

    @property
    def towers(self) -> Sequence[Any]:
        """Modules, frozen functions of one tensor, that others may share; none where that is not so."""

    def encode_prompt(self, question: str, has_image: bool = True) -> list[int]:
        """Token ids of a question in the chat template, up to where the answer begins."""

    def pixels(self, picture: Image) -> Pixels:
        """What the eyes take, on the CPU; called from several threads."""

    def see(self, pixels: Sequence[Pixels]) -> list[Tensor]:
        """What the language model takes of each image."""

    def answer(self, prompts: Sequence[Sequence[int]], seen: Sequence[Tensor | None], max_new_tokens: int) -> list[str]:
        """Greedy answers to a batch; ``seen`` holds None where a prompt has no image."""


Asked = tuple[list[int], "Tensor | None"]
"""A prompt, and what was seen of its image."""


def asking(answerer: Answerer, max_new_tokens: int) -> Callable[[Sequence[Asked]], list[str]]:
    """``answerer.answer`` as a function of one list, a part of which may be given."""

    def ask(asked: Sequence[Asked]) -> list[str]:
        prompts, seen = zip(*asked, strict=True)
        return answerer.answer(prompts, seen, max_new_tokens)

    return ask


def _without_gradients() -> AbstractContextManager[Any]:
    """Inference mode, unless the caller has a way of his own: a model that goes on training must be left no tensor that
    was made in it (ZeRO-3 gathers weights on the way)."""
    import torch

    return torch.inference_mode() if torch.is_grad_enabled() else nullcontext()


class MgmAnswerer:
    """An MGM, with or without a PEFT adapter, and its processor; see :class:`Answerer`.

    Args:
        half: The type that is computed in under autocast; None: there is no autocast.
    """

    def __init__(self, model: Any, processor: Any, half: torch.dtype | None = None) -> None:
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.processor, self._half = processor, half

    @cached_property
    def eyes(self) -> str:
        """Hash of projector and mining, and the towers' own mark."""
        from mgm_exp.model import connector_state

        digest = hashlib.sha256()
        for name, tensor in sorted(connector_state(self.model).items()):
            digest.update(name.encode() + str(tensor.dtype).encode() + tensor.float().numpy().tobytes())
        marks = [vars(tower).setdefault("mark_of_evaluation", secrets.token_hex(8)) for tower in self.towers]
        return "-".join([digest.hexdigest()[:16], *marks])

    @property
    def towers(self) -> Sequence[Any]:
        return [self.model.model.vision_tower, self.model.model.vision_tower_aux]

    def encode_prompt(self, question: str, has_image: bool = True) -> list[int]:
        ids: list[int] = self.processor.encode_prompt(question, has_image)
        return ids

    def pixels(self, picture: Image) -> Pixels:
        low, high = self.processor.pixels(picture, "pad")
        return low, high

    def see(self, pixels: Sequence[Pixels]) -> list[Tensor]:
        """One (N, hidden) for each image."""
        with _without_gradients():
            return list(self.model.model.encode_images(*self._stacked(pixels)))

    # -- features, as mgm_exp.evaluate.kept keeps them -----------------------------------------------------------

    def eyes_of(self, tier: str, batch: int) -> dict[str, Any]:
        """What decides on the bits of an image's features."""
        from mgm_exp.model.eyes import eyes_of

        return eyes_of(self.model, tier, self.processor.settings, batch=batch, half=self._half)

    def bytes_of(self, tier: str) -> int:
        """Bytes of an image's features, at most."""
        from mgm_exp.model.eyes import bytes_of_image

        return bytes_of_image(self.model, tier, self.processor.settings, self._half)

    def features(self, tier: str, pixels: Sequence[Pixels]) -> list[dict[str, Tensor]]:
        """What is kept of each image."""
        from mgm_exp.model.features import features_of

        return features_of(self.model.model, tier, *self._stacked(pixels))

    def depends_on_place(self, tier: str, pixels: Sequence[Pixels], features: Sequence[Mapping[str, Tensor]]) -> bool:
        """Whether an image's features depend on its place among these; those of the first ones here are given."""
        from mgm_exp.model.features import depends_on_place, features_of

        low, high = self._stacked(pixels)
        return depends_on_place(low, high, lambda *sides: features_of(self.model.model, tier, *sides), features)

    def see_features(self, features: Sequence[Mapping[str, Tensor]], detail: Sequence[Tensor]) -> list[Tensor]:
        """As ``see``, from features; ``detail`` are the high resolutions where features are of the low one alone."""
        import torch

        from mgm_exp.model.features import tokens_of

        tower = next(self.model.model.vision_tower.parameters())
        seen = {name: torch.stack([one[name] for one in features]).to(tower.device) for name in features[0]}
        high = torch.stack(list(detail)).to(tower.device, tower.dtype) if detail else None
        with _without_gradients():
            return list(tokens_of(self.model.model, seen, None, high))

    def _stacked(self, pixels: Sequence[Pixels]) -> tuple[Tensor, Tensor]:
        import torch

        tower = next(self.model.model.vision_tower.parameters())
        low, high = (torch.stack(side).to(tower.device, tower.dtype) for side in zip(*pixels, strict=True))
        return low, high

    def answer(self, prompts: Sequence[Sequence[int]], seen: Sequence[Tensor | None], max_new_tokens: int) -> list[str]:
        import torch

        device = self.model.device
        longest = max(len(ids) for ids in prompts)
        input_ids = torch.full((len(prompts), longest), self.processor.pad_token_id)
        attention_mask = torch.zeros((len(prompts), longest), dtype=torch.bool)
        for row, ids in enumerate(prompts):  # on the left, next to nothing: prompts of a batch are of similar length
            input_ids[row, longest - len(ids) :] = torch.tensor(ids)
            attention_mask[row, longest - len(ids) :] = True
        some = next((tokens for tokens in seen if tokens is not None), None)
        visual_tokens = None
        if some is not None:  # a row without an image takes one all the same, and puts it nowhere
            nothing = some.new_zeros(some.shape)
            visual_tokens = torch.stack([(nothing if tokens is None else tokens).to(device) for tokens in seen])
        with torch.no_grad():
            embeds, mask, _ = self.model.merge(
                input_ids.to(device), attention_mask.to(device), visual_tokens=visual_tokens, padding_side="left"
            )
            said = greedy(
                self.model,
                embeds,
                mask,
                max_new_tokens=max_new_tokens,
                stop_ids=self.processor.stop_token_ids,
            )
        return [self.processor.decode(ids) for ids in said]
