"""Captions from a BLIP-2 folder: the user's own (`data.captioner.path`) or, without one, the small shipped demo-blip2.

Greedy and batched, so equal images give equal captions in any batch size up to rounding. Weights are read from
safetensors only, and nothing is fetched from a network.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mgm_exp.config import CaptionerConfig
from mgm_exp.data.captioner.demo_blip2 import demo_folder, weights_sha256
from mgm_exp.errors import ModelError

if TYPE_CHECKING:
    import torch
    from PIL import Image

MAX_NEW_TOKENS = 48


def default_cache() -> Path:
    """Where the demo captioner is written out if no cache folder is given."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "mgm_exp"


class Blip2Captioner:
    """A BLIP-2 model that captions images.

    Args:
        folder: a BLIP-2 folder as `save_pretrained` writes it (`config.json`, safetensors, processor files); None is
            the shipped demo-blip2.
        device: "cpu", "cuda", "cuda:1", ...
        dtype: compute type; None is float32 on the CPU and bfloat16 elsewhere.
        cache: where demo-blip2 is written out on first use; None is `default_cache()`.

    Raises:
        ModelError: the folder is missing, not BLIP-2, or has no safetensors.
    """

    def __init__(
        self,
        folder: Path | None = None,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        *,
        cache: Path | None = None,
    ) -> None:
        import torch
        from transformers import AutoProcessor, Blip2ForConditionalGeneration

        self.is_demo = folder is None
        self.folder = demo_folder(cache or default_cache()) if folder is None else Path(folder)
        _check_folder(self.folder)
        if dtype is None:
            dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self._device, self._dtype = device, dtype
        with _without_loading_bar():
            self._processor = AutoProcessor.from_pretrained(str(self.folder), local_files_only=True)
            self._model = Blip2ForConditionalGeneration.from_pretrained(
                str(self.folder), local_files_only=True, use_safetensors=True, dtype=dtype
            )
        self._model.to(device).eval()

    @property
    def name(self) -> str:
        """What the captioner calls itself in provenance records."""
        return "demo-blip2 (synthetic)" if self.is_demo else self.folder.name

    def fingerprint(self) -> str:
        """SHA-256 of the weights: of the shipped file, or over the folder's config and safetensors files."""
        if self.is_demo:
            return weights_sha256()
        digest = hashlib.sha256()
        for path in sorted([self.folder / "config.json", *self.folder.glob("*.safetensors")]):
            digest.update(path.name.encode())
            with open(path, "rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
        return digest.hexdigest()

    def caption(self, images: Sequence[Image.Image], batch_size: int = 32) -> list[str]:
        """One greedy caption for each image, in order.

        Args:
            images: any size and mode; converted to RGB and resized by the folder's own image processor.
            batch_size: images in one forward pass; larger is faster until memory is full.
        """
        import torch

        captions: list[str] = []
        for start in range(0, len(images), batch_size):
            batch = [image.convert("RGB") for image in images[start : start + batch_size]]
            pixels = self._processor(images=batch, return_tensors="pt")["pixel_values"]
            with torch.inference_mode():
                ids = self._model.generate(
                    pixel_values=pixels.to(self._device, self._dtype),
                    do_sample=False,
                    num_beams=1,
                    max_new_tokens=MAX_NEW_TOKENS,
                )
            texts = self._processor.batch_decode(ids, skip_special_tokens=True)
            captions += [" ".join(text.split()) for text in texts]
        return captions


def open_captioner(section: CaptionerConfig, *, device: str, cache: Path) -> Blip2Captioner:
    """The captioner of a config: its BLIP-2 folder, or the shipped demo-blip2 where no path is given.

    Args:
        section: `data.captioner`.
        device: "cpu", "cuda", ...
        cache: folder below which demo-blip2 is written out on first use.
    """
    folder = None if section.path is None else Path(section.path).expanduser()
    return Blip2Captioner(folder, device, cache=cache / "captioners")


@contextmanager
def _without_loading_bar() -> Iterator[None]:
    """transformers draws a bar for every loaded model, across the run's own progress."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def _check_folder(folder: Path) -> None:
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(
            f"The captioner folder {folder} has no config.json.",
            advice="Give the folder of a BLIP-2 checkpoint (such as a copy of blip2-opt-2.7b), or no path: then the "
            "demo's own captioner is used.",
        )
    kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    if kind != "blip-2":
        raise ModelError(f"The captioner folder {folder} holds a model of type {kind!r}; allowed is 'blip-2'.")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"The captioner folder {folder} has no *.safetensors.",
            advice="Convert the weights to safetensors first; pickled weights are not opened.",
        )
