"""Pictures and rows that the tests of the data room are made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

GOLDEN = Path(__file__).parents[1] / "data" / "mgm"


@pytest.fixture(scope="session")
def processor() -> Any:
    """The real processor of the golden tiny model."""
    from mgm_exp.model import load_processor

    return load_processor(GOLDEN / "model", model_max_length=128)


def picture(width: int = 20, height: int = 14, seed: int = 0) -> Image.Image:
    """Random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An image root with ``0.png`` ... ``9.png``."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(10):
        picture(seed=i).save(folder / f"{i}.png")
    return folder


def pair(row_id: str, image: str, caption: str = "a red sign") -> dict[str, Any]:
    """A Data-Juicer row."""
    return {"id": row_id, "text": f"<__dj__image>\n{caption} <|__dj__eoc|>", "images": [image]}


def chat(row_id: str, image: str | None, *texts: str) -> dict[str, Any]:
    """A LLaVA row; the texts are human and gpt in turn."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": row_id, **({} if image is None else {"image": image}), "conversations": turns}


def write_lines(path: Path, rows: list[Any]) -> Path:
    """JSON lines; texts are written as they are."""
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


Maker = Callable[..., Any]
