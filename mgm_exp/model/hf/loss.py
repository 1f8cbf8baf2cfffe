"""The loss of a model of transformers: its own forward pass, its head at learnt positions alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgm_exp.errors import ModelError
from mgm_exp.model.configuration import IGNORE_INDEX
from mgm_exp.model.execution import Execution
from mgm_exp.model.head import summed_cross_entropy

# What configurations of transformers call the changes that some models make to their logits.
_AFTER_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
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
        target = labels[learnt]
        execution = getattr(self.model, "execution", Execution())
        with execution.keeping_activations(self.model):
            total = (
                self._with_logits(batch, chosen, target)
                if execution.loss_kernel == "torch" and execution.loss_chunk is None
                else self._in_chunks(batch, chosen, target, execution)
            )
        if not batch.get("image_count", 1):
            total = total + self._nothing_seen()
        return total / (max(len(target), 1) if normalizer is None else normalizer)

    def _with_logits(self, batch: Mapping[str, Any], chosen: Tensor, target: Tensor) -> Tensor:
        """The model's own logits of all learnt positions at once."""
        logits: Tensor = self.model(**model_inputs(self.model, batch), logits_to_keep=chosen, use_cache=False).logits
        logits = logits.reshape(-1, logits.shape[-1])
        if len(logits) != len(target):
            raise ModelError(
                f"{type(self.model).__name__} gave {len(logits)} logits where {len(target)} were asked for "
                "(logits_to_keep); it cannot be trained here."
            )
        return F.cross_entropy(logits.float(), target, reduction="sum")

    def _in_chunks(self, batch: Mapping[str, Any], chosen: Tensor, target: Tensor, execution: Execution) -> Tensor:
        """Without the logits: the model's body, and its head some positions at a time."""
        head = plain_head(self.model)
        hidden: Tensor = self.model.model(  # type: ignore[operator, union-attr]
            **model_inputs(self.model, batch), use_cache=False
        ).last_hidden_state
        kernel, chunk = execution.loss_kernel, execution.loss_chunk
        return summed_cross_entropy(hidden[chosen], head.weight, target, kernel=kernel, chunk=chunk)

    def _nothing_seen(self) -> Tensor:
        """Zero, with a gradient of zero for a trained connector: processes that exchange gradients wait for each."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return torch.stack([parameter.flatten()[:1].sum().float() * 0 for parameter in trained]).sum()


def plain_head(model: Any) -> nn.Linear:
    """The head of a model whose logits are one matrix product of what its body gives.

    Raises:
        ModelError: they are not, as far as its configuration says.
    """
    head = model.get_output_embeddings()
    text = model.config.get_text_config()
    after = [name for name in _AFTER_HEAD if getattr(text, name, None) not in (None, 1, 1.0)]
    is_plain = (
        isinstance(head, nn.Linear) and head.bias is None and isinstance(getattr(model, "model", None), nn.Module)
    )
    if after or not is_plain:
        what = f"changes its logits ({', '.join(after)})" if after else "has no head of a weight alone"
        raise ModelError(
            f"{type(model).__name__} {what}: its loss cannot be computed without its logits.",
            advice="Give train.loss_kernel=torch and no train.loss_chunk.",
        )
    return head


def model_inputs(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a batch as the model takes them: pixels in the dtype of its (frozen) vision tower."""
    return {
        key: value.to(model.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in batch.items()
        if key not in _NO_INPUTS
    }
