"""DeepSpeed's checkpoint files, opened by torch's restricted unpickler: tensors, plain values, four classes by name.

DeepSpeed itself opens them with the full unpickler, which runs whatever a file says. Their manifest tells a damaged
file from a whole one, but not a stranger's from ours.
"""

from __future__ import annotations

import pickle
from typing import Any

import torch

from mgm_exp.errors import TrainingFailed


def known_classes() -> list[Any]:
    """The classes whose objects DeepSpeed 0.19 keeps in its files: plain data, nothing in them is called."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


def load_restricted(path: str, map_location: Any = None) -> Any:
    """What DeepSpeed's checkpoint engine loads, in its place.

    Raises:
        TrainingFailed: the file holds something else than DeepSpeed writes.
    """
    try:
        with torch.serialization.safe_globals(known_classes()):
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise TrainingFailed(
            f"{path} holds objects that DeepSpeed does not write, and was refused: {str(error).splitlines()[0]}",
            advice="Delete the checkpoint that it belongs to; the same command then continues from the one before.",
        ) from error
