"""Prompts, label masks and pixels, exactly as the official training and evaluation code makes them.

Text: `mgm_exp.model.templates`, mgm/mm_utils.py, mgm/train/train.py `preprocess`. Pixels: transformers'
CLIPImageProcessor on the high resolution, then a bilinear copy for the low one. `encode` never refuses: a sample with
nothing left to learn comes back fully masked, and it is the caller who counts and names it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mgm_exp.errors import DataError, ModelError
from mgm_exp.model.backbones import Backbone
from mgm_exp.model.configuration import IGNORE_INDEX, IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from mgm_exp.model.folders import ModelSource, find_source, find_tower, read_json
from mgm_exp.model.resident import stamps_of
from mgm_exp.model.resolve import resolve_config
from mgm_exp.model.templates import TEMPLATES, Template
from mgm_exp.model.tokenizer import load_tokenizer

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class PixelSettings:
    """How an image becomes two tensors; sides in pixels."""

    image_size: int
    image_size_aux: int
    image_grid: int = 1
    image_global: bool = False
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    resample: int = int(Image.Resampling.BICUBIC)

    @property
    def n_views(self) -> int:
        return self.image_grid**2 + int(self.image_global) if self.image_grid > 1 else 1


@dataclass
class MGMProcessor:
    """Text and pixels of one model folder. Made by `load_processor`.

    Attributes:
        tokenizer: the folder's fast tokenizer.
        model_max_length: text-only rows are cut to it here; rows with an image after the merge, by the model.
        n_visual_tokens: embeddings that replace one image placeholder.
        template: what is written around the turns.
        captions_only: training rows are an image and its caption, without turns; questions are asked as ever.
    """

    tokenizer: Any
    settings: PixelSettings
    patch_size: int
    model_max_length: int
    template: Template = TEMPLATES["gemma"]
    captions_only: bool = False
    _table: Tensor = field(init=False, repr=False)
    _later_head: int = field(init=False, repr=False, default=0)

    def __post_init__(self) -> None:
        # Every 8-bit value's normalised float, per channel: what the official arithmetic gives, looked up
        scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
        mean, std = np.array(self.settings.mean, np.float32), np.array(self.settings.std, np.float32)
        core = getattr(self.tokenizer, "backend_tokenizer", None)
        if core is not None:  # what a tokenizer.json says of cutting and padding is not for the core to do here
            core.no_truncation()
            core.no_padding()
        self._table = torch.from_numpy((scaled[None] - mean[:, None]) / std[:, None])  # (3, 256)
        if self.template.has_fused_head:
            # Tokens that a later round has more than the same text by itself: the official code subtracts one where
            # the tokenizer is not `legacy`, which is what Vicuna's gives ("USER" behind </s>, "_US" "ER" by itself)
            head = self.template.heads[0]
            alone, behind = self._tokenize(head), self._tokenize(self.template.separator + head)
            self._later_head = len(behind) - 1 - len(alone)

    def text_key(self) -> Hashable | None:
        """All that `encode` depends on; None: it cannot be told, for a tokenizer that lies in no folder."""
        folder = Path(self.tokenizer.name_or_path or "/nowhere")
        if not folder.is_dir():
            return None
        return stamps_of([folder]), self.template, self.model_max_length, self.n_visual_tokens, self.captions_only

    @property
    def n_visual_tokens(self) -> int:
        return (self.settings.image_size // self.patch_size) ** 2 * self.settings.n_views

    @property
    def pad_token_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    @property
    def stop_token_ids(self) -> list[int]:
        """Tokens that end an answer: the end of the sequence, and the end of a turn where the tokenizer has it."""
        ids = [self.tokenizer.eos_token_id]
        if self.template.end_of_turn is not None:
            end = self.tokenizer.convert_tokens_to_ids(self.template.end_of_turn)
            ids += [end] if end != self.tokenizer.unk_token_id else []
        return list(dict.fromkeys(int(i) for i in ids if i is not None))

    def prompt(self, conversations: Sequence[Mapping[str, str]], has_image: bool = True) -> str:
        """The training text of a conversation; with `has_image` placeholders move to the front of their turn.

        Raises:
            DataError: turns that do not alternate between human and gpt.
        """
        turns = [dict(turn) for turn in conversations]
        if turns and turns[0]["from"] != "human":
            turns = turns[1:]  # the official code skips a leading answer
        for i, turn in enumerate(turns):
            if turn["from"] != ("human", "gpt")[i % 2]:
                raise DataError(
                    f"Turn {i + 1} of a conversation is from {turn['from']!r}, expected {('human', 'gpt')[i % 2]!r}: "
                    "turns alternate between 'human' and 'gpt'."
                )
        values = [front_image(turn["value"]) if has_image else turn["value"] for turn in turns]
        if self.captions_only:
            return self._caption(values)
        return self.template.text(values)

    def encode(self, conversations: Sequence[Mapping[str, str]], has_image: bool = True) -> dict[str, list[int]]:
        """Token ids and labels of a conversation for training.

        Args:
            conversations: `[{"from": "human"|"gpt", "value": str}, ...]`.
            has_image: `<image>` marks an image; without it the word is plain text and the row is cut to
                `model_max_length`.

        Returns:
            `input_ids` with `IMAGE_TOKEN_INDEX` for an image, and `labels`: answers with what ends them (all that the
            template writes behind an answer); everything `IGNORE_INDEX` where the official mask gives up.
        """
        prompt = self.prompt(conversations, has_image)
        template = self.template
        tokenize = self._tokenize_with_image if has_image or self.captions_only else self._tokenize
        input_ids = tokenize(prompt)
        if not has_image:
            input_ids = input_ids[: self.model_max_length]

        labels = list(input_ids)
        if self.captions_only:
            _mask(labels, 0, len(tokenize(IMAGE_TOKEN)) if prompt else len(labels))
            return {"input_ids": input_ids, "labels": labels}
        n_real = len(input_ids) - input_ids.count(self.pad_token_id)
        place = 1
        _mask(labels, 0, place)
        for number, round_text in enumerate(template.rounds(prompt)):
            if not round_text:
                break
            parts = round_text.split(template.answer_start)
            if len(parts) != 2:
                break
            # Each round is tokenised with a <bos> of its own, which stands for the separator that was split off
            shift = self._later_head if number else 0
            instruction = len(tokenize(parts[0] + template.answer_start)) - template.unlearnt + shift
            _mask(labels, place, place + instruction)
            place += len(tokenize(round_text)) + shift
        _mask(labels, place, len(labels))
        if place < self.model_max_length and place != n_real:
            _mask(labels, 0, len(labels))
        return {"input_ids": input_ids, "labels": labels}

    def encode_prompt(self, question: str, has_image: bool = True) -> list[int]:
        """Token ids that ask one question and end where the answer begins."""
        if has_image:
            question = front_image(question) if IMAGE_TOKEN in question else f"{IMAGE_TOKEN}\n{question}"
        text = self.template.text([question, ""])
        return self._tokenize_with_image(text) if has_image else self._tokenize(text)

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Text of an answer, without special tokens, turn marks and outer white space."""
        kept = [int(i) for i in ids if int(i) >= 0]
        text = self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for mark in self.template.marks:
            text = text.replace(mark, "")
        return text.strip()

    def pixels(self, image: Image.Image, aspect: str = "pad") -> tuple[Tensor, Tensor]:
        """Both resolutions of an image.

        Args:
            image: any mode; converted to RGB.
            aspect: "pad" (to a square in the mean colour; stage 2 and evaluation) or "square" (centre crop; stage 1).

        Returns:
            image (3, h, h), or with a grid (views, 3, h, h): crops row by row, global view last; and
            image_aux (3, H, H). float32, normalised.
        """
        image_aux = self.detail(self.square(image, aspect))
        return self.low(image_aux), image_aux

    def square(self, image: Image.Image, aspect: str = "pad") -> np.ndarray[Any, Any]:
        """An image as the high resolution shows it, before it is normalised: (H, H, 3) uint8. See `pixels`."""
        if aspect not in ("pad", "square"):
            raise DataError(f"Image aspect {aspect!r} is not known: allowed are 'pad' and 'square'.")
        s = self.settings
        image = image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
        colour = tuple(int(m * 255) for m in s.mean)
        if aspect == "pad" and image.width > image.height:
            image = _resize_wide(image, colour, s.image_size_aux, s.resample)
        else:
            image = _pad_to_square(image, colour) if aspect == "pad" else image
            image = _resize_shortest(image, s.image_size_aux, s.resample)
        return np.asarray(image, dtype=np.uint8).copy()

    def detail(self, square: np.ndarray[Any, Any] | Tensor) -> Tensor:
        """The high resolution (3, H, H) of what `square` gave, normalised."""
        values = np.asarray(square)
        found = np.empty((3, *values.shape[:2]), np.float32)
        for channel, table in enumerate(self._table.numpy()):
            np.take(table, values[..., channel], out=found[channel], mode="clip")  # all of 0..255 are there
        return torch.from_numpy(found)

    def no_pixels(self) -> tuple[Tensor, Tensor]:
        """The zeros that a text-only row carries; shapes as from `pixels`."""
        s = self.settings
        shape = (3, s.image_size, s.image_size)
        image = torch.zeros(shape if s.image_grid <= 1 else (s.n_views, *shape))
        return image, torch.zeros(3, s.image_size_aux, s.image_size_aux)

    def low(self, image_aux: Tensor) -> Tensor:
        """The low resolution of a high one, as `pixels` gives both."""
        s = self.settings
        g, side = max(s.image_grid, 1), s.image_size
        low = _bilinear(image_aux[None], side * g)
        if g == 1:
            return low[0]
        crops = low.reshape(3, g, side, g, side).permute(1, 3, 0, 2, 4).reshape(g * g, 3, side, side)
        return torch.cat([crops, _bilinear(low, side)]) if s.image_global else crops

    @staticmethod
    def _caption(values: Sequence[str]) -> str:
        """The official `plain`: an image, then its caption; empty where a row is anything else (there it asserts)."""
        if len(values) != 2 or IMAGE_TOKEN not in values[0]:
            return ""
        return f"{IMAGE_TOKEN}{values[1]}\n"

    def _tokenize(self, text: str) -> list[int]:
        # The tokenizer's own core gives the same ids as calling it, in a third of the time
        core = getattr(self.tokenizer, "backend_tokenizer", None)
        return list(core.encode(text).ids) if core is not None else list(self.tokenizer(text)["input_ids"])

    def _tokenize_with_image(self, text: str) -> list[int]:
        # The parts around a placeholder are tokenised by themselves; only the first keeps its <bos>
        first, *rest = (self._tokenize(part) for part in text.split(IMAGE_TOKEN))
        ids = list(first)
        has_bos = bool(first) and first[0] == self.tokenizer.bos_token_id
        for part in rest:
            ids += [IMAGE_TOKEN_INDEX, *part[int(has_bos) :]]
        return ids


def front_image(value: str) -> str:
    """Moves `<image>` to the front of a turn; several become one, as in the official code."""
    if IMAGE_TOKEN not in value:
        return value
    return f"{IMAGE_TOKEN}\n{value.replace(IMAGE_TOKEN, '').strip()}".strip()


def load_processor(
    path: str | Path, model_max_length: int | None = None, stage: str = "instruct", *, base: str | Path | None = None
) -> MGMProcessor:
    """The processor of a model folder or of a run.

    Args:
        path, base: as for `load_model`.
        model_max_length: tokens of a row; None: `tokenizer_model_max_length` of the folder.
        stage: "align" encodes as stage 1 does (of Vicuna: the image and its caption, no turns).

    Raises:
        ModelError: no tokenizer, or no description of the CLIP tower.
    """
    return processor_of(find_source(path, base), model_max_length, stage)


def processor_of(source: ModelSource, model_max_length: int | None = None, stage: str = "instruct") -> MGMProcessor:
    """As `load_processor`, for a source that is known already."""
    config = resolve_config(source)
    clip = config.vision_config or {}
    settings: dict[str, Any] = {}
    clip_folder = find_tower(source, source.vision_tower, config.mm_vision_tower)
    for folder in (source.folder, clip_folder):
        if folder is not None and (folder / "preprocessor_config.json").is_file():
            stated = read_json(folder / "preprocessor_config.json")
            names = {"image_mean": "mean", "image_std": "std"}
            settings = {new: tuple(stated[old]) for old, new in names.items() if old in stated}
            if "resample" in stated:
                settings["resample"] = int(stated["resample"])
            break
    tokenizer = load_tokenizer(source.folder, config.backbone)
    template = template_of(tokenizer, config.backbone, source.folder)
    return MGMProcessor(
        tokenizer=tokenizer,
        settings=PixelSettings(
            image_size=int(clip["image_size"]),
            image_size_aux=config.image_size_aux,
            image_grid=config.image_grid,
            image_global=config.image_global,
            **settings,
        ),
        patch_size=int(clip["patch_size"]),
        model_max_length=model_max_length or config.tokenizer_model_max_length or config.max_position_embeddings,
        template=template,
        captions_only=stage == "align" and template.aligns_by_captions,
    )


def template_of(tokenizer: Any, backbone: Backbone, folder: Path) -> Template:
    """The template that a language model was tuned with, told by the tokens it knows.

    Raises:
        ModelError: a tokenizer of none of them.
    """
    for name in backbone.templates:
        if TEMPLATES[name].fits(tokenizer.get_vocab(), tokenizer.eos_token):
            return TEMPLATES[name]
    raise ModelError(
        f"The tokenizer in {folder} ends sequences with {tokenizer.eos_token!r} and belongs to none of the templates "
        f"of MGM on {backbone.name}: {', '.join(backbone.templates)}.",
        advice="vicuna_v1 needs a tokenizer whose end of sequence is </s>, llama_3 one that knows <|eot_id|>.",
    )


def _mask(labels: list[int], start: int, stop: int) -> None:
    for i in range(start, min(stop, len(labels))):
        labels[i] = IGNORE_INDEX


def _pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    canvas = Image.new("RGB", (side, side), colour)  # type: ignore[arg-type]
    canvas.paste(image, ((side - width) // 2, (side - height) // 2))
    return canvas


def _resize_wide(image: Image.Image, colour: tuple[int, ...], side: int, resample: int) -> Image.Image:
    """A wide image padded and resized to side x side, with the bits of doing so in this order.

    Pillow resizes row by row, then column by column. Rows of one colour stay what they are in the first of these, so
    that they are put there after it: a quarter to a third less time for a photo of 4 : 3.
    """
    width, height = image.size
    method = Image.Resampling(resample)
    canvas = Image.new("RGB", (side, width), colour)  # type: ignore[arg-type]
    canvas.paste(image.resize((side, height), resample=method), (0, (width - height) // 2))
    return canvas.resize((side, side), resample=method)


def _resize_shortest(image: Image.Image, side: int, resample: int) -> Image.Image:
    """Shortest edge to `side`, then the central side x side square."""
    width, height = image.size
    short, long = sorted((width, height))
    other = int(side * long / short)
    new = (side, other) if width <= height else (other, side)
    image = image.resize(new, resample=Image.Resampling(resample))
    left, top = (new[0] - side) // 2, (new[1] - side) // 2
    return image.crop((left, top, left + side, top + side))


def _bilinear(images: Tensor, side: int) -> Tensor:
    return F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)
