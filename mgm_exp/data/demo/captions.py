"""Captions of demo scenes: terse raw ones as found beside web images, rich ones, and a reader that scores captions.

The raw captions are the demo's uncurated training data. The rich ones train the shipped tiny models; a captioner's
output is read back with `read_caption` and compared with the scene, field by field.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from mgm_exp.data.demo.scenes import COLOURS, KINDS, SHAPED_KINDS, SHAPES, Item, Scene

NOISE_CAPTIONS = ("for sale", "new photo", "my picture", "photo of the day")

_LETTERING = {
    "sign": ("that reads {}", "with the word {}"),
    "label": ("of brand {}", "with the name {}"),
    "jersey": ("with number {}",),
    "tag": ("with price {}",),
}


def raw_caption(scene: Scene, rng: random.Random) -> str:
    """A terse caption, alt-text like.

    35 % kind and text of one object, 25 % colour, kind and text, 20 % noise that says nothing about the image,
    20 % a kind alone.
    """
    item = rng.choice(scene.items)
    draw = rng.random()
    if draw < 0.35:
        return f"{item.kind} {item.text}"
    if draw < 0.60:
        return f"{item.colour} {item.kind} {item.text}"
    if draw < 0.80:
        return f"img {rng.randint(100, 9999)}" if rng.random() < 0.5 else rng.choice(NOISE_CAPTIONS)
    return item.kind


def describe_item(item: Item, rng: random.Random) -> str:
    """One object in words: "a purple round sign that reads BANK"."""
    article = "an" if item.colour[0] in "aeiou" else "a"
    shape = f"{item.shape} " if item.kind in SHAPED_KINDS else ""
    return f"{article} {item.colour} {shape}{item.kind} {rng.choice(_LETTERING[item.kind]).format(item.text)}"


def rich_caption(scene: Scene, rng: random.Random) -> str:
    """A full caption of both objects in one of four orders."""
    upper, lower = (describe_item(item, rng) for item in scene.items)
    return rng.choice(
        (
            f"{upper} above {lower}",
            f"{lower} below {upper}",
            f"above, {upper}; below, {lower}",
            f"below, {lower}; above, {upper}",
        )
    )


@dataclass(frozen=True)
class ReadItem:
    """What a caption says about one object; a field that is not mentioned is None."""

    kind: str
    colour: str | None
    shape: str | None
    text: str | None


_ITEM = re.compile(
    rf"(?:an?|the)\s+(?:(?P<colour>{'|'.join(COLOURS)})\s+)?(?:(?P<shape>{'|'.join(SHAPES)})\s+)?(?P<kind>{'|'.join(KINDS)})\b"
    r"(?:\s+(?:that reads|with the word|of brand|with the name|with number|with price)\s+(?P<text>[A-Z0-9$.]+))?"
)


def read_caption(caption: str) -> list[ReadItem]:
    """The objects that a caption names, from top to bottom.

    A caption "X below Y" or "below, X; above, Y" names the lower object first.
    """
    found = [ReadItem(m["kind"], m["colour"], m["shape"], m["text"]) for m in _ITEM.finditer(caption)]
    is_lower_first = caption.startswith("below,") or (" below " in caption and not caption.startswith("above,"))
    return found[::-1] if is_lower_first else found


FIELDS = ("kind", "colour", "shape", "text")


def score_caption(caption: str, scene: Scene) -> dict[str, tuple[int, int]]:
    """Compare a caption with the scene, field by field.

    Objects are matched by kind. `shape` counts only for kinds that come in two shapes.

    Returns:
        (right, asked) for each of `FIELDS`, for "order" (upper and lower named as such; asked once when both objects
        were found) and for "whole" (everything right; asked once).
    """
    read = read_caption(caption)
    by_kind = {r.kind: r for r in read}
    score = dict.fromkeys((*FIELDS, "order", "whole"), (0, 0))
    all_right = True
    for item in scene.items:
        named = by_kind.get(item.kind)
        for name in FIELDS:
            if name == "shape" and item.kind not in SHAPED_KINDS:
                continue
            is_right = named is not None and getattr(named, name) == getattr(item, name)
            all_right &= is_right
            right, asked = score[name]
            score[name] = (right + is_right, asked + 1)
    if len(read) == 2 and {r.kind for r in read} == {i.kind for i in scene.items}:
        in_order = read[0].kind == scene.items[0].kind
        score["order"] = (int(in_order), 1)
        all_right &= in_order
    else:
        all_right = False
    score["whole"] = (int(all_right), 1)
    return score
