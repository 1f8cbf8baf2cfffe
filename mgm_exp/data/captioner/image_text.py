"""Captions from any image-text-to-text model that transformers knows: LLaVA, Qwen-VL, Idefics, PaliGemma, BLIP, ...

    ImageTextCaptioner(Path("/models/llava-1.5-7b-hf"), "cuda").caption(images)

A model that brings a chat template is asked through it. Without one the prompt follows the image's placeholder; models
that only describe (BLIP, GIT) are asked nothing, unless a prompt is given that their caption goes on from.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgm_exp.data.captioner import folders
from mgm_exp.data.captioner.model_captioner import CaptionSettings, ModelCaptioner
from mgm_exp.errors import ModelError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

CAPTION_REQUEST = "Describe this image in one sentence."
"""What a model is asked whose prompt is not given. Short captions serve a 2B model better than long ones."""


def can_open(kind: str) -> bool:
    """Whether transformers has an image-text-to-text model of a `model_type`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


class ImageTextCaptioner(ModelCaptioner):
    """An image-text-to-text model that captions images and, where it can be asked, answers questions.

    Args:
        folder: as `save_pretrained` of model and processor write it (safetensors).
        device: "cpu", "cuda", "cuda:1", ...
        settings: how captions are written; None: the defaults.

    Raises:
        ModelError: the folder is missing, holds another kind of model, or cannot be loaded.
    """

    def __init__(self, folder: Path, device: str = "cpu", settings: CaptionSettings | None = None) -> None:
        from transformers import AutoModelForImageTextToText

        super().__init__(settings or CaptionSettings())
        self.folder, self.name = Path(folder), Path(folder).name
        kind = folders.model_type(self.folder, "captioner")
        if not can_open(kind):
            raise ModelError(
                f"The captioner folder {folder} holds a model of type {kind!r}, which does not write about images.",
                advice="Give a BLIP-2 folder, or one of an image-text-to-text model (LLaVA, Qwen-VL, BLIP, ...).",
            )
        folders.check_weights(self.folder, "captioner")
        precision = self.settings.precision
        self.device, self._dtype = device, folders.compute_type(device, precision)
        self._model, self._processor = folders.load(
            AutoModelForImageTextToText, self.folder, "captioner", device=device, precision=precision
        )
        tokenizer = self._processor.tokenizer
        tokenizer.padding_side = "left"  # what is written follows the prompt
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if self._model.generation_config.pad_token_id is None:
            self._model.generation_config.pad_token_id = tokenizer.pad_token_id
        self._has_template = self._processor.chat_template is not None or tokenizer.chat_template is not None
        self._image_token = getattr(self._processor, "image_token", None)
        self.can_answer = self._has_template or self._image_token is not None

    def fingerprint(self) -> str:
        """SHA-256 over the folder's config and safetensors files."""
        return folders.fingerprint(self.folder)

    def _prompt(self, prompt: str | None) -> str | None:
        """The whole text beside an image."""
        if not self.can_answer:
            return prompt
        prompt = CAPTION_REQUEST if prompt is None else prompt
        if self._has_template:
            content = [{"type": "image"}, {"type": "text", "text": prompt}]
            templated = self._processor if self._processor.chat_template is not None else self._processor.tokenizer
            text: str = templated.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            return text
        return prompt if str(self._image_token) in prompt else f"{self._image_token}\n{prompt}"

    def _see(self, images: tuple[Image.Image, ...], prompt: str | None) -> Any:
        """Tensors of pixels and, where something is asked, of tokens."""
        text = self._prompt(prompt)
        if text is None:
            inputs = self._processor(images=list(images), return_tensors="pt")
        else:
            bos = self._processor.tokenizer.bos_token
            inputs = self._processor(
                images=[[image] for image in images] if self._has_template else list(images),
                text=[text] * len(images),
                return_tensors="pt",
                padding=True,
                # A template that writes the first token itself must not get a second one.
                add_special_tokens=not (bos is not None and text.startswith(bos)),
            )
        return inputs.to(self.device, self._dtype)

    def _write(self, seen: Any, prompt: str | None, **generate: Any) -> list[str]:
        inputs = {name: value.clone() for name, value in seen.items()}  # some models write into their inputs
        written = self._model.generate(**inputs, **generate)
        return self._processor.batch_decode(_without_prompt(written, seen.get("input_ids")), skip_special_tokens=True)


def _without_prompt(written: Tensor, asked: Tensor | None) -> Tensor:
    """What was written, (B, T), without the prompt that most models repeat in front of it.

    BLIP replaces the first token of the prompt and leaves out its last one.
    """
    import torch

    if asked is None:
        return written
    for length in (asked.shape[1], asked.shape[1] - 1):
        if length > 0 and written.shape[1] >= length and torch.equal(written[:, 1:length], asked[:, 1:length]):
            return written[:, length:]
    return written
