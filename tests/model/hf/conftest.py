"""The tiny models of other families, made once, and what the tests say to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from .tiny_models import MAKERS

FAMILIES = tuple(MAKERS)
TURNS = [
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "a red sign"},
    {"from": "human", "value": "What colour is the door?"},
    {"from": "gpt", "value": "blue and green"},
]


def picture(width: int = 70, height: int = 50, colour: tuple[int, int, int] = (200, 30, 30)) -> Image.Image:
    """Not of one colour: image tokens differ."""
    image = Image.new("RGB", (width, height), colour)
    image.paste((20, 60, 220), (0, 0, width // 2, height // 3))
    return image


def turns_for(family: str, turns: list[dict[str, str]] | None = None) -> list[dict[str, str]]:
    """PaliGemma takes one question and one answer."""
    return (turns or TURNS)[:2] if family == "paligemma" else (turns or TURNS)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family -> folder of its tiny model."""
    root = tmp_path_factory.mktemp("models")

    def made(family: str) -> Path:
        folder = root / family
        return folder if folder.is_dir() else MAKERS[family](folder)

    return made


@pytest.fixture(scope="session")
def processor_of(folder_of: Callable[[str], Path]) -> Callable[..., Any]:
    """Family -> processor."""
    from mgm_exp.model.hf.loading import open_processor

    return lambda family, max_length=None: open_processor(folder_of(family), max_length)
