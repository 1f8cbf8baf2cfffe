"""Captions from a BLIP-2 folder: the user's own (`data.captioner.path`) or, without one, the small shipped demo-blip2.

Weights are read from safetensors only, and nothing is fetched from a network. Images are encoded once, whatever is
asked about them afterwards.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgm_exp.data.captioner import folders
from mgm_exp.data.captioner.demo_blip2 import demo_folder, weights_sha256
from mgm_exp.data.captioner.model_captioner import CaptionSettings, ModelCaptioner
from mgm_exp.errors import ModelError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

BLIP2 = "blip-2"


def default_cache() -> Path:
    """Where the demo captioner is written out if no cache folder is given."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "mgm_exp"


class Blip2Captioner(ModelCaptioner):
    """A BLIP-2 model (Li et al., 2023, arXiv 2301.12597) that captions images, and answers questions.

    Args:
        folder: a BLIP-2 folder as `save_pretrained` writes it (`config.json`, safetensors, processor files); None is
            the shipped demo-blip2, which only describes.
        device: "cpu", "cuda", "cuda:1", ...
        settings: how captions are written; None: the defaults.
        cache: where demo-blip2 is written out on first use; None is `default_cache()`.

    Raises:
        ModelError: the folder is missing, not BLIP-2, has no safetensors, or cannot be loaded.
    """

    def __init__(
        self,
        folder: Path | None = None,
        device: str = "cpu",
        settings: CaptionSettings | None = None,
        *,
        cache: Path | None = None,
    ) -> None:
        from transformers import Blip2ForConditionalGeneration

        super().__init__(settings or CaptionSettings())
        self.is_demo = folder is None
        self.can_answer = not self.is_demo
        self.folder = demo_folder(cache or default_cache()) if folder is None else Path(folder)
        self.name = "demo-blip2 (synthetic)" if self.is_demo else self.folder.name
        kind = folders.model_type(self.folder, "captioner")
        if kind != BLIP2:
            raise ModelError(
                f"The captioner folder {self.folder} holds a model of type {kind!r}; allowed is {BLIP2!r}."
            )
        folders.check_weights(self.folder, "captioner")
        precision = self.settings.precision
        self.device, self._dtype = device, folders.compute_type(device, precision)
        self._model, self._processor = folders.load(
            Blip2ForConditionalGeneration, self.folder, "captioner", device=device, precision=precision
        )

    def fingerprint(self) -> str:
        """SHA-256 of the weights: of the shipped file, or over the folder's config and safetensors files."""
        return weights_sha256() if self.is_demo else folders.fingerprint(self.folder)

    def _question(self, question: str) -> str:
        return f"Question: {question} Answer:"  # the form that BLIP-2 was evaluated with (section 4.1)

    def _seen(self, images: tuple[Image.Image, ...], prompt: str | None) -> Any:
        return super()._seen(images, None)  # what is seen does not depend on what is asked

    def _see(self, images: tuple[Image.Image, ...], prompt: str | None) -> Tensor:
        """(B, queries, hidden size of the language model)"""
        pixels = self._processor.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
        return self._model.get_image_features(pixels.to(self.device, self._dtype)).pooler_output

    def _write(self, seen: Tensor, prompt: str | None, **generate: Any) -> list[str]:
        """As `Blip2ForConditionalGeneration.generate` does it, but for the images being encoded already."""
        import torch

        model, tokenizer = self._model, self._processor.tokenizer
        config = model.config
        words = [config.text_config.bos_token_id] if prompt is None else tokenizer(prompt)["input_ids"]
        ids = torch.tensor([[config.image_token_index] * config.num_query_tokens + words], device=seen.device)
        ids = ids.repeat(len(seen), 1)  # (B, queries + words)
        embeds = model.get_input_embeddings()(ids)
        is_image = (ids == config.image_token_index).unsqueeze(-1)
        embeds = embeds.masked_scatter(is_image, seen.to(embeds.device, embeds.dtype))
        written = model.language_model.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(ids), **generate)
        return self._processor.batch_decode(written, skip_special_tokens=True)
