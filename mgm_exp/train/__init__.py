"""Training: the loop, the engines (plain PyTorch, DeepSpeed ZeRO), checkpoints, schedules, processes.

:func:`run_stage` is the entry. Names are loaded on first use: importing this package does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mgm_exp.train.features import encode_images_once
    from mgm_exp.train.job import StageSummary, TrainJob
    from mgm_exp.train.launch import run_stage
    from mgm_exp.train.loop import train_stage

_HOMES = {
    "StageSummary": "job",
    "TrainJob": "job",
    "encode_images_once": "features",
    "run_stage": "launch",
    "train_stage": "loop",
}
__all__ = ["StageSummary", "TrainJob", "encode_images_once", "run_stage", "train_stage"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
