"""Generated scene-text images: two lettered objects, one above the other, on a noisy background.

A scene is drawn glyph by glyph with the one font that is bundled with Pillow, so that nothing but Pillow and numpy
is needed and the place of every glyph is known (the tiny base model is trained on those places).

Scene i of a split is drawn from its own random stream: it depends neither on how many scenes are asked for nor on
the number of processes. Splits are disjoint by construction: what a scene says (kinds, colours, shapes and texts of
its two objects) is hashed into one of 16 buckets, and a split keeps only scenes of its own buckets.

Equal pixels are promised for equal versions of Pillow and its FreeType only; the fingerprint of a written set is
therefore taken from the rendered pixels.
"""

from __future__ import annotations

import functools
import hashlib
import random
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GENERATOR_VERSION = 1

SIZE = 128
"""Width and height of a scene in pixels."""

KINDS = ("sign", "tag", "jersey", "label")
SHAPES = ("square", "round")
SHAPED_KINDS = ("sign", "label")
"""Only these kinds come in two shapes; tags and jerseys have one outline each."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (205, 35, 35),
    "orange": (245, 140, 30),
    "yellow": (240, 215, 50),
    "green": (35, 150, 60),
    "blue": (45, 75, 200),
    "purple": (125, 45, 155),
    "black": (28, 24, 28),
    "white": (238, 238, 238),
}

SIGN_WORDS = (
    "OPEN", "STOP", "EXIT", "SALE", "CAFE", "BANK", "TAXI", "PARK", "HOTEL", "PIZZA", "BAR", "CAKE", "RICE",
    "GYM", "POST", "TOYS", "WASH", "BOOKS", "FISH", "SHOES", "MILK", "ZOO", "INFO", "TEA", "KEYS",
)  # fmt: skip
BRANDS = (
    "KIVO", "HALO", "TEKO", "VELA", "NORA", "ROXY", "DEXA", "MIRO", "SENA", "LUMO", "ZUPA", "BELO", "FIXA",
    "JUNO", "OMEX", "YARO",
)  # fmt: skip

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"
CHARACTERS = LETTERS + DIGITS + "$."
"""Every character that can stand on an object."""

MAX_TEXT = 6
"""Longest text on an object, in characters."""

FONT_SIZES = range(12, 27)
_BOLD_FROM = 16
"""Smallest font size that may be drawn with a stroke; below it glyphs would run together."""

_BUCKETS = 16
SPLIT_BUCKETS: dict[str, range] = {
    "pretrain": range(7),
    "train": range(7, 12),
    "val": range(12, 13),
    "test": range(13, 15),
    "probe": range(15, 16),
}
"""Buckets of each split. `pretrain` feeds the shipped tiny models, `probe` measures them; the demo uses the rest."""


@dataclass(frozen=True)
class Item:
    """One lettered object.

    Args:
        kind: one of `KINDS`.
        colour: one of `COLOURS`.
        shape: one of `SHAPES`; always "square" for kinds without a choice of shape.
        text: what is written on it, 1 to `MAX_TEXT` characters of `CHARACTERS`.
    """

    kind: str
    colour: str
    shape: str
    text: str


@dataclass(frozen=True)
class Scene:
    """Two objects of different kinds, `items[0]` above `items[1]`, and the seed of everything else that is drawn."""

    index: int
    split: str
    items: tuple[Item, Item]
    render_seed: int

    def signature(self) -> str:
        """What the scene says, without how it is drawn: equal signatures ask for equal answers."""
        return "|".join(f"{i.kind},{i.colour},{i.shape},{i.text}" for i in self.items)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Glyph:
    """Where one character was drawn: `box` = (left, top, right, bottom) in pixels, right and bottom exclusive."""

    item: int
    position: int
    is_last: bool
    character: str
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Rendered:
    """A drawn scene: `pixels` (128, 128, 3) uint8, the glyphs, and the outer box of each object."""

    pixels: np.ndarray
    glyphs: tuple[Glyph, ...]
    boxes: tuple[tuple[int, int, int, int], tuple[int, int, int, int]]


def scene_stream(seed: int, split: str, index: int) -> random.Random:
    """The random stream of one scene (seeded by text, which Python hashes with SHA-512: stable across versions)."""
    return random.Random(f"mgm-demo/{GENERATOR_VERSION}/{seed}/{split}/{index}")


def random_text(kind: str, rng: random.Random) -> str:
    """Random characters of the kind's alphabet, for training readers that cannot lean on a word list."""
    if kind == "jersey":
        return "".join(rng.choice(DIGITS) for _ in range(rng.randint(1, 3)))
    if kind == "tag":
        if rng.random() < 0.4:
            return f"${rng.choice(DIGITS)}.{rng.choice(DIGITS)}"
        return "$" + "".join(rng.choice(DIGITS) for _ in range(rng.randint(1, 3)))
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(2, 5)))


def demo_text(kind: str, rng: random.Random) -> str:
    """A text of the demo: a word on a sign, a brand on a label, 1 to 99 on a jersey, a price on a tag."""
    if kind == "sign":
        return rng.choice(SIGN_WORDS)
    if kind == "label":
        return rng.choice(BRANDS)
    if kind == "jersey":
        return str(rng.randint(1, 99))
    if rng.random() < 0.4:
        return f"${rng.randint(1, 9)}.{rng.randint(0, 9)}"
    return f"${rng.randint(2, 99)}"


def _draw_item(kind: str, rng: random.Random, random_share: float) -> Item:
    text = random_text(kind, rng) if rng.random() < random_share else demo_text(kind, rng)
    shape = rng.choice(SHAPES) if kind in SHAPED_KINDS else "square"
    return Item(kind, rng.choice(tuple(COLOURS)), shape, text)


def sample_scene(seed: int, split: str, index: int, *, random_share: float = 0.0) -> Scene:
    """Scene `index` of a split.

    Args:
        seed: seed of the whole set.
        split: a key of `SPLIT_BUCKETS`.
        index: number of the scene within the split, 0 or more.
        random_share: probability that an object carries random characters in place of a demo text.
    """
    rng = scene_stream(seed, split, index)
    buckets = SPLIT_BUCKETS[split]
    while True:
        upper, lower = rng.sample(KINDS, 2)
        items = (_draw_item(upper, rng, random_share), _draw_item(lower, rng, random_share))
        scene = Scene(index, split, items, rng.getrandbits(63))
        if hashlib.sha256(scene.signature().encode()).digest()[0] % _BUCKETS in buckets:
            return scene


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("this Pillow was built without FreeType; install Pillow's official wheel")
    return font


@functools.cache
def glyph_mask(character: str, size: int, stroke: int) -> tuple[Image.Image, int, int, float]:
    """One glyph as a coverage mask.

    Returns:
        The mask ("L", cropped to its ink), the offset of its left and top edge from the pen, and the pen's advance.
    """
    font = _font(size)
    left, top, right, bottom = font.getbbox(character, stroke_width=stroke)
    canvas = Image.new("L", (int(right - left) + 4, int(bottom - top) + 4), 0)
    draw = ImageDraw.Draw(canvas)
    draw.text((2 - left, 2 - top), character, font=font, fill=255, stroke_width=stroke)
    ink = canvas.getbbox() or (0, 0, canvas.width, canvas.height)
    return canvas.crop(ink), int(left) - 2 + ink[0], int(top) - 2 + ink[1], font.getlength(character)


def text_extent(text: str, size: int, stroke: int, spacing: int) -> tuple[float, int, int]:
    """Width of a text drawn glyph by glyph, and the top and bottom of its ink below the pen."""
    masks = [glyph_mask(c, size, stroke) for c in text]
    width = sum(m[3] for m in masks) + spacing * (len(text) - 1)
    return width, min(m[2] for m in masks), max(m[2] + m[0].height for m in masks)


def draw_text(
    image: Image.Image,
    text: str,
    pen: tuple[float, float],
    *,
    size: int,
    stroke: int,
    spacing: int,
    jitter: tuple[int, ...],
    ink: tuple[int, int, int],
) -> list[tuple[int, int, int, int]]:
    """Draw a text glyph by glyph from the pen position and return the box of each glyph's ink."""
    x, y = pen
    boxes = []
    for character, shift in zip(text, jitter, strict=True):
        mask, dx, dy, advance = glyph_mask(character, size, stroke)
        left, top = round(x) + dx, round(y) + dy + shift
        image.paste(ink, (left, top), mask)
        boxes.append((left, top, left + mask.width, top + mask.height))
        x += advance + spacing
    return boxes


def _luminance(colour: tuple[int, int, int]) -> float:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def _background(rng: random.Random) -> Image.Image:
    first = np.array([rng.randint(60, 210) for _ in range(3)], dtype=np.float32)
    second = np.clip(first + np.array([rng.randint(-60, 60) for _ in range(3)], dtype=np.float32), 0, 255)
    ramp = np.linspace(0.0, 1.0, SIZE, dtype=np.float32)
    weight = ramp[:, None] if rng.random() < 0.5 else ramp[None, :]
    weight = np.broadcast_to(weight, (SIZE, SIZE))[..., None]
    pixels = first * (1.0 - weight) + second * weight
    return Image.fromarray(pixels.astype(np.uint8), "RGB")


def _outline(draw: ImageDraw.ImageDraw, item: Item, box: tuple[int, int, int, int], fill: Any, ink: Any) -> float:
    """Draw the object itself and return the share of its width that text may take."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    if item.kind == "sign":
        middle = (left + right) // 2
        draw.rectangle((middle - 2, bottom, middle + 2, bottom + 7), fill=(70, 55, 45))
        if item.shape == "round":
            draw.ellipse(box, fill=fill, outline=ink, width=3)
            return 0.76
        draw.rectangle(box, fill=fill, outline=ink, width=3)
        return 0.84
    if item.kind == "label":
        if item.shape == "round":
            draw.ellipse(box, fill=fill)
        else:
            draw.rectangle(box, fill=fill)
        inset = width // 4
        for y in (top + height // 8, bottom - height // 8):
            draw.line((left + inset, y, right - inset, y), fill=ink, width=2)
        return 0.76 if item.shape == "round" else 0.84
    if item.kind == "tag":
        nose, middle = left + width // 5, (top + bottom) // 2
        draw.polygon(
            [(left, middle), (nose, top), (right, top), (right, bottom), (nose, bottom)], fill=fill, outline=ink
        )
        draw.ellipse((left + 6, middle - 3, left + 12, middle + 3), fill=ink)
        return 0.66
    sleeve, body = width // 4, width // 5
    cuff, armpit = top + height // 3, top + height // 2
    draw.polygon(
        [
            (left + sleeve, top),
            (left + 2 * sleeve - 4, top),
            (left + 2 * sleeve, top + 5),
            (right - 2 * sleeve + 4, top),
            (right - sleeve, top),
            (right, cuff),
            (right - body + 4, armpit),
            (right - body, cuff + 2),
            (right - body, bottom),
            (left + body, bottom),
            (left + body, cuff + 2),
            (left + body - 4, armpit),
            (left, cuff),
        ],
        fill=fill,
        outline=ink,
    )
    return 0.54


def _place_text(
    image: Image.Image, item: Item, box: tuple[int, int, int, int], room: float, ink: Any, rng: random.Random
) -> list[tuple[int, int, int, int]]:
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    size, stroke, spacing = rng.choice(FONT_SIZES), rng.randint(0, 1), rng.randint(0, 2)
    spacing = max(spacing, stroke)
    jitter = tuple(rng.randint(-1, 1) for _ in item.text)
    limit = 0.5 if item.kind == "label" else 0.6
    while size > FONT_SIZES.start:
        extent, ink_top, ink_bottom = text_extent(item.text, size, stroke, spacing)
        if extent <= room * width and ink_bottom - ink_top <= limit * height:
            break
        size -= 1
    stroke = stroke if size >= _BOLD_FROM else 0
    extent, ink_top, ink_bottom = text_extent(item.text, size, stroke, spacing)
    slack = max(0.0, room * width - extent) / 2
    centre_x = (left + right) / 2 + (width * 0.07 if item.kind == "tag" else 0.0)
    centre_y = (top + bottom) / 2 + (height * 0.08 if item.kind == "jersey" else 0.0)
    x = centre_x - extent / 2 + rng.uniform(-0.6, 0.6) * slack
    y = centre_y - (ink_top + ink_bottom) / 2 + rng.uniform(-2, 2)
    return draw_text(image, item.text, (x, y), size=size, stroke=stroke, spacing=spacing, jitter=jitter, ink=ink)


def render_scene(scene: Scene) -> Rendered:
    """Draw a scene; equal scenes give equal pixels."""
    rng = random.Random(scene.render_seed)
    image = _background(rng)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(0, 4)):
        ends = tuple(rng.randint(0, SIZE) for _ in range(4))
        draw.line(ends, fill=tuple(rng.randint(30, 230) for _ in range(3)), width=rng.randint(1, 3))
    glyphs: list[Glyph] = []
    boxes = []
    for number, item in enumerate(scene.items):
        width, height = rng.randint(72, 96), rng.randint(44, 54)
        left = rng.randint(1, SIZE - 2 - width)
        top = 64 * number + rng.randint(1, 62 - height)
        box = (left, top, left + width, top + height)
        base = COLOURS[item.colour]
        fill = tuple(max(0, min(255, c + rng.randint(-16, 16))) for c in base)
        ink = (16, 16, 16) if _luminance(base) > 120 else (245, 245, 245)
        room = _outline(draw, item, box, fill, ink)
        for position, glyph_box in enumerate(_place_text(image, item, box, room, ink, rng)):
            last = position == len(item.text) - 1
            glyphs.append(Glyph(number, position, last, item.text[position], glyph_box))
        boxes.append(box)
    amplitude, brightness = rng.randint(3, 10), rng.uniform(0.8, 1.15)
    # RandomState's stream is frozen by numpy; Generator's may change between versions.
    noise = np.random.RandomState(rng.getrandbits(32)).randint(-amplitude, amplitude + 1, (SIZE, SIZE, 3))
    pixels = np.asarray(image, dtype=np.float32) * np.float32(brightness) + noise
    pixels = np.clip(pixels, 0, 255).astype(np.uint8)
    return Rendered(pixels, tuple(glyphs), (boxes[0], boxes[1]))
