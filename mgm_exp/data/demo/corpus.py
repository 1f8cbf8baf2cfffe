"""Pictures with dense labels that teach the tiny towers to see: glyph pages and demo scenes.

The generator knows where every glyph and object is, so each position of the stride-4 feature map has a target:
which character, the character's index in its string, whether it is the last; and each cell of the 8 x 8 token grid:
kind, colour and shape of the object there. Class 0 always means "nothing here".
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mgm_exp.data.demo.scenes import (
    CHARACTERS,
    COLOURS,
    KINDS,
    MAX_TEXT,
    SHAPES,
    SIZE,
    Glyph,
    Item,
    draw_text,
    render_scene,
    sample_scene,
    text_extent,
)
from mgm_exp.store import spawned_pool, usable_cores

PAGE_SIZE = 64
STRIDE = 4
GRID = 8

CHARACTER_CLASS = {c: i + 1 for i, c in enumerate(CHARACTERS)}
KIND_CLASS = {k: i + 1 for i, k in enumerate(KINDS)}
COLOUR_CLASS = {c: i + 1 for i, c in enumerate(COLOURS)}
SHAPE_CLASS = {s: i + 1 for i, s in enumerate(SHAPES)}

N_CHARACTER, N_INDEX, N_LAST = len(CHARACTERS) + 1, MAX_TEXT + 1, 3
N_KIND, N_COLOUR, N_SHAPE = len(KINDS) + 1, len(COLOURS) + 1, len(SHAPES) + 1


@dataclass(frozen=True)
class Pages:
    """Glyph pages: `pixels` (N, 64, 64, 3) uint8, `characters` (N, 16, 16) uint8 classes."""

    pixels: np.ndarray
    characters: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)


@dataclass(frozen=True)
class SceneSet:
    """Scenes with their labels.

    Args:
        pixels: (N, 128, 128, 3) uint8.
        positions: (N, 3, 32, 32) uint8: character, index and last class of each stride-4 position.
        cells: (N, 3, 8, 8) uint8: kind, colour and shape class of each token cell.
        slots: (N, 6, 8, 8) uint8: for each index in a string, the character class of the glyph that lies (mostly) in
            the cell, 0 if none.
        items: the two objects of each scene.
    """

    pixels: np.ndarray
    positions: np.ndarray
    cells: np.ndarray
    slots: np.ndarray
    items: list[tuple[Item, Item]]

    def __len__(self) -> int:
        return len(self.pixels)


def _span(low: int, high: int, stride: int, size: int) -> range:
    """Positions whose centre lies in [low, high); at least the one that holds the middle."""
    first = max(0, -(-(low - stride // 2) // stride))
    last = min(size, -(-(high - stride // 2) // stride))
    if first < last:
        return range(first, last)
    middle = min(size - 1, max(0, ((low + high) // 2) // stride))
    return range(middle, middle + 1)


def make_page(rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """One glyph page: rows of random characters in one ink on a plain ground, and its character classes."""
    ground = tuple(rng.randint(0, 255) for _ in range(3))
    is_bright = 0.299 * ground[0] + 0.587 * ground[1] + 0.114 * ground[2] > 120
    ink = (16, 16, 16) if is_bright else (245, 245, 245)
    image = Image.new("RGB", (PAGE_SIZE, PAGE_SIZE), ground)
    side = PAGE_SIZE // STRIDE
    classes = np.zeros((side, side), dtype=np.uint8)
    top = rng.randint(0, 4)
    while top < PAGE_SIZE - 8:
        size = rng.randint(12, 26)
        stroke = rng.randint(0, 1) if size >= 16 else 0
        spacing = max(stroke, rng.randint(0, 2))
        text = "".join(rng.choice(CHARACTERS) for _ in range(PAGE_SIZE // (size // 2) + 1))
        _, ink_top, ink_bottom = text_extent(text, size, stroke, spacing)
        jitter = tuple(rng.randint(-1, 1) for _ in text)
        pen = (rng.uniform(-4, 4), top - ink_top)
        boxes = draw_text(image, text, pen, size=size, stroke=stroke, spacing=spacing, jitter=jitter, ink=ink)
        for character, (x0, y0, x1, y1) in zip(text, boxes, strict=True):
            if x0 < -2 or y0 < -2 or x1 > PAGE_SIZE + 2 or y1 > PAGE_SIZE + 2:
                continue
            rows, columns = _span(y0, y1, STRIDE, side), _span(x0, x1, STRIDE, side)
            classes[rows.start : rows.stop, columns.start : columns.stop] = CHARACTER_CLASS[character]
        top += ink_bottom - ink_top + rng.randint(2, 6)
    amplitude = rng.randint(3, 10)
    noise = np.random.RandomState(rng.getrandbits(32)).randint(-amplitude, amplitude + 1, (PAGE_SIZE, PAGE_SIZE, 3))
    pixels = np.clip(np.asarray(image, dtype=np.int16) + noise, 0, 255).astype(np.uint8)
    return pixels, classes


def label_scene(
    items: tuple[Item, Item], glyphs: tuple[Glyph, ...], boxes: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The `positions`, `cells` and `slots` of one scene (see `SceneSet`)."""
    side = SIZE // STRIDE
    positions = np.zeros((3, side, side), dtype=np.uint8)
    cells = np.zeros((3, GRID, GRID), dtype=np.uint8)
    slots = np.zeros((MAX_TEXT, GRID, GRID), dtype=np.uint8)
    step = SIZE // GRID
    for item, (x0, y0, x1, y1) in zip(items, boxes, strict=True):
        rows, columns = _span(y0, y1, step, GRID), _span(x0, x1, step, GRID)
        labels = (KIND_CLASS[item.kind], COLOUR_CLASS[item.colour], SHAPE_CLASS[item.shape])
        for channel, label in enumerate(labels):
            cells[channel, rows.start : rows.stop, columns.start : columns.stop] = label
    for glyph in glyphs:
        x0, y0, x1, y1 = glyph.box
        rows, columns = _span(y0, y1, STRIDE, side), _span(x0, x1, STRIDE, side)
        labels = (CHARACTER_CLASS[glyph.character], glyph.position + 1, 2 if glyph.is_last else 1)
        for channel, label in enumerate(labels):
            positions[channel, rows.start : rows.stop, columns.start : columns.stop] = label
        for row in {min(GRID - 1, max(0, y // step)) for y in (y0 + (y1 - y0) // 4, y1 - 1 - (y1 - y0) // 4)}:
            for column in {min(GRID - 1, max(0, x // step)) for x in (x0 + (x1 - x0) // 4, x1 - 1 - (x1 - x0) // 4)}:
                slots[glyph.position, row, column] = labels[0]
    return positions, cells, slots


def _page_chunk(job: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    seed, start, stop = job
    made = [make_page(random.Random(f"mgm-page/{seed}/{i}")) for i in range(start, stop)]
    return np.stack([m[0] for m in made]), np.stack([m[1] for m in made])


def _scene_chunk(job: tuple[int, str, float, int, int]) -> tuple[Any, ...]:
    seed, split, random_share, start, stop = job
    pixels: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    cells: list[np.ndarray] = []
    slots: list[np.ndarray] = []
    items: list[tuple[Item, Item]] = []
    for index in range(start, stop):
        scene = sample_scene(seed, split, index, random_share=random_share)
        drawn = render_scene(scene)
        maps = label_scene(scene.items, drawn.glyphs, drawn.boxes)
        pixels.append(drawn.pixels)
        for store, value in zip((positions, cells, slots), maps, strict=True):
            store.append(value)
        items.append(scene.items)
    return np.stack(pixels), np.stack(positions), np.stack(cells), np.stack(slots), items


def _in_processes(function: Callable[[Any], Any], jobs: list[Any], workers: int) -> list[Any]:
    if workers == 1 or len(jobs) == 1:
        return [function(job) for job in jobs]
    pool = spawned_pool(workers)
    try:
        return list(pool.map(function, jobs))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def default_workers() -> int:
    """Usable cores, at most 8."""
    return min(8, usable_cores())


def make_pages(n: int, *, seed: int, workers: int | None = None) -> Pages:
    """`n` glyph pages; page i does not depend on `n` or `workers`."""
    jobs = [(seed, s, min(s + 500, n)) for s in range(0, n, 500)]
    parts = _in_processes(_page_chunk, jobs, workers or default_workers())
    return Pages(np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]))


def make_scenes(
    n: int, *, seed: int, split: str = "pretrain", random_share: float = 0.5, workers: int | None = None
) -> SceneSet:
    """`n` labelled scenes of a split; scene i does not depend on `n` or `workers`."""
    jobs = [(seed, split, random_share, s, min(s + 250, n)) for s in range(0, n, 250)]
    parts = _in_processes(_scene_chunk, jobs, workers or default_workers())
    arrays = [np.concatenate([p[k] for p in parts]) for k in range(4)]
    return SceneSet(arrays[0], arrays[1], arrays[2], arrays[3], [item for p in parts for item in p[4]])
