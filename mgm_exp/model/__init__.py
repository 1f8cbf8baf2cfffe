"""MGM: the LLM with two vision towers and patch info mining, its processor, checkpoints and adapters.

Names are loaded on first use: asking for `IMAGE_TOKEN_INDEX` must not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

IMAGE_TOKEN_INDEX = -200

_HOMES = {
    "MGMConfig": "configuration",
    "mgm_2b_config": "configuration",
    "MGMForConditionalGeneration": "mgm",
    "LossModule": "mgm",
}
__all__ = ["IMAGE_TOKEN_INDEX", *_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
