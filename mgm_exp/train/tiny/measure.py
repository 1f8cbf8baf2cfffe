"""What the tiny base sees: its captions of unseen scenes, read back and compared with what was drawn."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer

from mgm_exp.data.demo.captions import FIELDS, score_caption
from mgm_exp.data.demo.corpus import SceneSet
from mgm_exp.data.demo.scenes import Scene
from mgm_exp.data.demo.teaching import normalised
from mgm_exp.model.configuration import IMAGE_TOKEN_INDEX
from mgm_exp.model.mgm import MGMForConditionalGeneration
from mgm_exp.train.tiny.conversations import CAPTION_REQUESTS
from mgm_exp.train.tiny.towers import low_resolution


@torch.no_grad()
def answer_all(
    model: MGMForConditionalGeneration,
    tokenizer: Tokenizer,
    scenes: SceneSet,
    request: str,
    *,
    batch: int = 50,
    max_new_tokens: int = 48,
) -> list[str]:
    """The model's greedy answer to one request about each scene."""
    prefix = tokenizer.encode("<start_of_turn>user\n").ids
    suffix = tokenizer.encode(f"\n{request}<end_of_turn>\n<start_of_turn>model\n", add_special_tokens=False).ids
    prompt = torch.tensor([*prefix, IMAGE_TOKEN_INDEX, *suffix])
    stop = [tokenizer.token_to_id("<end_of_turn>"), tokenizer.token_to_id("<eos>")]
    side = model.model.vision_tower.config.image_size
    answers = []
    for start in range(0, len(scenes), batch):
        images_aux = normalised(scenes.pixels[start : start + batch])
        ids = model.generate(
            prompt.expand(len(images_aux), -1),
            images=low_resolution(images_aux, side),
            images_aux=images_aux,
            max_new_tokens=max_new_tokens,
            eos_token_id=stop,
        )
        answers += [tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids.tolist()]
    return answers


def field_accuracy(captions: list[str], scenes: SceneSet) -> dict[str, float]:
    """Share of right kinds, colours, shapes and texts, of right order, and of captions with everything right."""
    totals = {name: [0, 0] for name in (*FIELDS, "order", "whole")}
    for caption, items in zip(captions, scenes.items, strict=True):
        for name, (right, asked) in score_caption(caption, Scene(0, "probe", items, 0)).items():
            totals[name][0] += right
            totals[name][1] += asked
    return {name: right / asked if asked else 0.0 for name, (right, asked) in totals.items()}


def measure_captions(model: MGMForConditionalGeneration, tokenizer: Tokenizer, scenes: SceneSet) -> dict[str, float]:
    """`field_accuracy` of the model's own captions."""
    return field_accuracy(answer_all(model, tokenizer, scenes, CAPTION_REQUESTS[0]), scenes)


def measure_reading(model: MGMForConditionalGeneration, tokenizer: Tokenizer, scenes: SceneSet) -> float:
    """Share of exact answers to "read the upper one" and "read the lower one"."""
    right = 0
    for position, place in enumerate(("upper", "lower")):
        answers = answer_all(model, tokenizer, scenes, f"read the {place} one", max_new_tokens=8)
        right += sum(answer == items[position].text for answer, items in zip(answers, scenes.items, strict=True))
    return right / (2 * len(scenes))
