"""Answers of two models to the same questions about the same pictures, compared logit by logit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from mgm_exp.errors import ModelError
from mgm_exp.model.adapters import load_adapter
from mgm_exp.model.finding import Finding
from mgm_exp.model.folders import ModelSource
from mgm_exp.model.loading import load_source
from mgm_exp.model.mgm import MGMForConditionalGeneration
from mgm_exp.model.processor import MGMProcessor, load_processor, processor_of

# Largest difference of logits, as a share of their standard deviation. Both models compute in fp32, so what differs is
# that the merged weights were rounded to the folder's dtype and LoRA's product was not.
TOLERANCES = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1.5e-1, "int8": 5e-1, "nf4": 3.0}
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
_MOST_PIXELS = 50_000_000
OF_LOGITS = "logits of merged and base + adapter"
QUESTIONS = ("What is in the picture?", "Read the text on the sign.", "Which colour is the larger shape?")


def drawn_pictures() -> list[Image.Image]:
    """Three small pictures that are the same everywhere: shapes and bars on a slope of colours."""
    pictures = []
    for number, (width, height) in enumerate([(320, 240), (200, 300), (256, 256)]):
        slope = Image.linear_gradient("L").resize((width, height))
        picture = Image.merge("RGB", (slope, slope.rotate(180), Image.new("L", (width, height), 80 + 60 * number)))
        draw = ImageDraw.Draw(picture)
        draw.ellipse((20, 20, 120, 140), fill=(200, 30, 40 + 70 * number))
        draw.rectangle((90, 90, 180, 200), fill=(20, 60 + 60 * number, 220))
        for bar in range(3 + number):
            draw.line((30 + 15 * bar, 150, 40 + 15 * bar, 220), fill=(255, 255, 255), width=4)
        pictures.append(picture)
    return pictures


def pictures_of(images: Sequence[Path]) -> list[Image.Image]:
    """The pictures of these files; three that are drawn where none is named.

    Raises:
        ModelError: a file is no image.
    """
    return [_opened(path) for path in images] or drawn_pictures()


def check_logits(
    folder: Path, source: ModelSource, stored: str, pictures: Sequence[Image.Image], device: str
) -> Finding:
    """Whether a merged folder answers as its base and adapter do.

    Args:
        folder: The merged one.
        source: Base and adapter.
        stored: How the folder holds its weights, a name of `TOLERANCES`.
        pictures: A question is asked about each.
        device: Where both models compute, one after the other.
    """
    try:
        merged = load_source(ModelSource(folder), device=device, dtype="float32", attn_implementation="eager")
        here = _answers(merged, load_processor(folder), pictures)
    except ModelError as error:
        return Finding(OF_LOGITS, None, f"the folder does not load: {error}")
    del merged
    model, processor = _with_adapter(source, device)
    there = _answers(model, processor, pictures)
    if any(a.shape != b.shape for a, b in zip(here, there, strict=True)):
        return Finding(
            OF_LOGITS, False, "the two give sequences of different length: other tokenizer or image settings"
        )
    spread = float(torch.cat([t.flatten() for t in there]).std())
    largest = max(float((a - b).abs().max()) for a, b in zip(here, there, strict=True))
    limit = TOLERANCES[stored] * spread
    says = f"differ by at most {largest:.2g}; allowed {limit:.2g} ({stored}), standard deviation {spread:.2g}"
    if source.adapter is not None:
        layers: list[Any] = [m for m in model.modules() if hasattr(m, "enable_adapters") and hasattr(m, "base_layer")]
        for layer in layers:
            layer.enable_adapters(False)
        if layers:
            [without] = _answers(model, processor, pictures[:1])
            says += f"; without the adapter {float((without - there[0]).abs().max()):.2g}"
    return Finding(OF_LOGITS, math.isfinite(largest) and largest <= limit, f"{len(pictures)} pictures: {says}")


def without_logits() -> Finding:
    """What a check says that was asked to load no model."""
    return Finding(OF_LOGITS, None, "left out with --no-logits")


def answers_of(source: ModelSource, pictures: Sequence[Image.Image], device: str) -> list[Tensor]:
    """Logits (1, L, vocabulary) of base and adapter, of a question about each picture."""
    return _answers(*_with_adapter(source, device), pictures)


def _with_adapter(source: ModelSource, device: str) -> tuple[MGMForConditionalGeneration, MGMProcessor]:
    plain = replace(source, adapter=None)
    model = load_source(plain, device=device, dtype="float32", attn_implementation="eager")
    if source.adapter is not None:
        load_adapter(model, source.adapter).float()  # an old adapter of 16 bits would compute in 16 bits
    return model, processor_of(plain)


@torch.no_grad()
def _answers(
    model: MGMForConditionalGeneration, processor: MGMProcessor, pictures: Sequence[Image.Image]
) -> list[Tensor]:
    """Logits (1, L, vocabulary) of a question about each picture."""
    out = []
    for number, picture in enumerate(pictures):
        ids = torch.tensor([processor.encode_prompt(QUESTIONS[number % len(QUESTIONS)])], device=model.device)
        image, image_aux = (part[None].to(model.device) for part in processor.pixels(picture))
        out.append(model(input_ids=ids, images=image, images_aux=image_aux).logits.float().cpu())
    return out


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels; at most {_MOST_PIXELS:,} are decoded")
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ModelError(f"{path} cannot be opened as an image: {error}") from error
