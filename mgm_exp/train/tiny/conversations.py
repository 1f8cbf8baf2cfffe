"""What the tiny base is taught to say: captions and requests about scenes, none of them worded like a demo question.

Objects are addressed by their place ("the upper one") or described whole ("describe the sign"); the demo asks for
single facts of an object addressed by its kind. The underlying reading is the same, the wording and the form of the
answer are not, so the untouched base fails the demo questions and a short training teaches them.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from tokenizers import Tokenizer

from mgm_exp.data.demo.captions import describe_item, rich_caption
from mgm_exp.data.demo.scenes import KINDS, SHAPED_KINDS, Item, Scene
from mgm_exp.model.configuration import IGNORE_INDEX, IMAGE_TOKEN_INDEX

CAPTION_REQUESTS = ("describe the picture", "give a caption", "show this image in words", "caption this image")
PLACES = ("upper", "lower")

TEXT_HEAVY_MIX = {
    "read": 0.30,
    "list": 0.10,
    "spell": 0.06,
    "which": 0.08,
    "there": 0.04,
    "attribute": 0.14,
    "caption": 0.14,
    "describe": 0.14,
}
"""Share of each kind of round; more than half is about what is written."""


@dataclass(frozen=True)
class Round:
    """One request and its answer."""

    request: str
    answer: str


def _attribute(place: str, item: Item, rng: random.Random) -> Round:
    choices = [("paint", item.colour), ("object", item.kind)]
    if item.kind in SHAPED_KINDS:
        choices.append(("outline", item.shape))
    name, value = rng.choice(choices)
    return Round(f"{name} of the {place} one", value)


def _one_round(kind: str, scene: Scene, rng: random.Random) -> Round:
    position = rng.randrange(2)
    item, place = scene.items[position], PLACES[position]
    if kind == "read":
        return Round(f"read the {place} one", item.text)
    if kind == "list":
        return Round("list the texts in order", " and ".join(i.text for i in scene.items))
    if kind == "spell":
        return Round(f"spell the {place} one", " ".join(item.text))
    if kind == "which":
        return Round(f"which object carries {item.text}", item.kind)
    if kind == "there":
        asked = rng.choice(KINDS)
        return Round(f"any {asked} in this image", "yes" if asked in {i.kind for i in scene.items} else "no")
    if kind == "attribute":
        return _attribute(place, item, rng)
    if kind == "describe":
        return Round(f"describe the {item.kind}", describe_item(item, rng))
    return Round(rng.choice(CAPTION_REQUESTS), rich_caption(scene, rng))


def base_rounds(scene: Scene, rng: random.Random, n: int) -> list[Round]:
    """`n` different requests about a scene."""
    kinds, weights = tuple(TEXT_HEAVY_MIX), tuple(TEXT_HEAVY_MIX.values())
    rounds: dict[str, Round] = {}
    while len(rounds) < n:
        made = _one_round(rng.choices(kinds, weights)[0], scene, rng)
        rounds.setdefault(made.request, made)
    return list(rounds.values())


def all_requests() -> set[str]:
    """Every request that base training can hold, with `*` for a text."""
    requests = {"list the texts in order", "which object carries *", *CAPTION_REQUESTS}
    for place in PLACES:
        requests |= {f"{verb} the {place} one" for verb in ("read", "spell")}
        requests |= {f"{name} of the {place} one" for name in ("paint", "object", "outline")}
    for kind in KINDS:
        requests |= {f"any {kind} in this image", f"describe the {kind}"}
    return requests


class ConversationEncoder:
    """Turns rounds into ids and labels exactly as MGM's gemma template does, piece by piece and cached."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._user = self._ids("<start_of_turn>user\n")
        self._model = self._ids("<end_of_turn>\n<start_of_turn>model\n")
        self._end = self._ids("<end_of_turn>\n<eos>")
        self.bos: int = tokenizer.encode("").ids[0]

    @lru_cache(maxsize=200_000)  # noqa: B019 - one encoder lives as long as a training run
    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def __call__(self, rounds: list[Round]) -> tuple[list[int], list[int]]:
        """(ids, labels); the image stands at the beginning of the first request."""
        ids, labels = [self.bos], [IGNORE_INDEX]
        for number, made in enumerate(rounds):
            asked = [*self._user]
            if number == 0:
                asked += [IMAGE_TOKEN_INDEX, *self._ids("\n")]
            asked += [*self._ids(made.request), *self._model]
            answered = [*self._ids(made.answer), *self._end]
            ids += asked + answered
            labels += [IGNORE_INDEX] * len(asked) + answered
        return ids, labels


def pad_batch(rows: list[tuple[list[int], list[int]]], pad: int) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and `labels`, right-padded to the longest row."""
    longest = max(len(ids) for ids, _ in rows)
    input_ids = np.full((len(rows), longest), pad, dtype=np.int64)
    labels = np.full((len(rows), longest), IGNORE_INDEX, dtype=np.int64)
    mask = np.zeros((len(rows), longest), dtype=bool)
    for row, (ids, targets) in enumerate(rows):
        input_ids[row, : len(ids)], labels[row, : len(ids)], mask[row, : len(ids)] = ids, targets, True
    return {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(mask),
        "labels": torch.from_numpy(labels),
    }


def token_weights(tokenizer: Tokenizer, text_weight: float) -> torch.Tensor:
    """Loss weight of each token of the vocabulary: `text_weight` for what can stand on an object, else 1."""
    weights = torch.ones(tokenizer.get_vocab_size())
    for token, index in tokenizer.get_vocab().items():
        if re.fullmatch(r"[A-Z0-9$.]+", token):
            weights[index] = text_weight
    return weights
