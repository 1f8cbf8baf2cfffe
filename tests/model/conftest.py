"""Golden data of the official code, and models made from it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_files import GOLDEN, SEVEN
from safetensors.torch import load_file
from torch import Tensor

from mgm_exp.model import MGMForConditionalGeneration, load_model

torch.set_num_threads(1)  # tensors this small are slower on several


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture
def model() -> MGMForConditionalGeneration:
    """The golden model, new for each test."""
    return load_model(GOLDEN / "model")


@pytest.fixture(scope="session")
def still_model() -> MGMForConditionalGeneration:
    """The golden model for tests that change nothing."""
    return load_model(GOLDEN / "model")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the golden checkpoint folder with its towers beside it, to be damaged at will."""
    shutil.copytree(GOLDEN / "model", tmp_path / "checkpoint" / "model")
    shutil.copytree(GOLDEN / "towers", tmp_path / "checkpoint" / "towers")
    return tmp_path / "checkpoint" / "model"


@pytest.fixture(scope="session")
def case() -> Callable[[str], dict[str, Tensor]]:
    def read(name: str) -> dict[str, Tensor]:
        tensors = load_file(str(GOLDEN / f"case_{name}.safetensors"))
        return {k: t.float() if t.dtype == torch.float16 else t for k, t in tensors.items()}

    return read


@pytest.fixture(scope="session")
def batch(case: Callable[[str], dict[str, Tensor]]) -> dict[str, Tensor]:
    tensors = case("basic")
    return {k: tensors[k] for k in ("input_ids", "attention_mask", "labels", "images", "images_aux")}


@pytest.fixture
def lora() -> dict[str, Any]:
    return {"kind": "lora", "rank": 8, "alpha": 16, "dropout": 0.0, "target_modules": list(SEVEN)}
