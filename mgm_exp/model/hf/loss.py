"""The loss of a model of transformers: its own forward pass, its head at learnt positions alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgm_exp.errors import ModelError
from mgm_exp.model.configuration import IGNORE_INDEX

_NO_INPUTS = ("labels", "ids", "image_count")


class HfLossModule(nn.Module):
    """Makes the loss the forward of a module, so that the hooks of DDP and DeepSpeed fire around it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Mapping[str, Any], normalizer: float | None = None) -> Tensor:
        """Summed cross-entropy (in fp32) of the learnt tokens over `normalizer`.

        Args:
            batch: What :meth:`HfProcessor.collate` made, on the model's device.
            normalizer: None: the learnt tokens of this batch, at least 1.

        Raises:
            ModelError: the model cannot give logits at chosen positions.
        """
        labels: Tensor = batch["labels"][:, 1:]
        learnt = labels != IGNORE_INDEX
        # A row that ends here predicts nothing
        chosen = torch.cat([learnt, torch.zeros_like(learnt[:, :1])], dim=1)
        logits: Tensor = self.model(**model_inputs(self.model, batch), logits_to_keep=chosen, use_cache=False).logits
        target = labels[learnt]
        logits = logits.reshape(-1, logits.shape[-1])
        if len(logits) != len(target):
            raise ModelError(
                f"{type(self.model).__name__} gave {len(logits)} logits where {len(target)} were asked for "
                "(logits_to_keep); it cannot be trained here."
            )
        total = F.cross_entropy(logits.float(), target, reduction="sum")
        if not batch.get("image_count", 1):
            total = total + self._nothing_seen()
        return total / (max(len(target), 1) if normalizer is None else normalizer)

    def _nothing_seen(self) -> Tensor:
        """Zero, with a gradient of zero for a trained connector: processes that exchange gradients wait for each."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return torch.stack([parameter.flatten()[:1].sum().float() * 0 for parameter in trained]).sum()


def model_inputs(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a batch as the model takes them: pixels in the dtype of its (frozen) vision tower."""
    return {
        key: value.to(model.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in batch.items()
        if key not in _NO_INPUTS
    }
