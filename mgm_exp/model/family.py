"""What training and evaluation ask of a kind of model: MGM, or a model of transformers.

    family = family_of(config.model)
    model, report = family.build(config.model, device=device, dtype=torch.float32, seed=0)
    trainable = family.make_trainable(model, "instruct", config, seed=1)
    loss = family.loss_module(model)(batch, normalizer)

The loop, the engines, checkpoints and reports know no more of a model than this.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgm_exp.config import ExperimentConfig, ModelConfig, ModelFamily

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mgm_exp.model.trainable import TrainableSet

CONNECTOR, ADAPTER, MODEL = "connector.safetensors", "adapter", "model"
"""What stages leave: of align the first, of instruct one of the others."""


class Family(ABC):
    """One kind of model."""

    @abstractmethod
    def processor(self, section: ModelConfig, max_length: int | None, stage: str = "instruct") -> Any:
        """The model's processor; sequences are cut to ``max_length``. A stage may have turns of its own."""

    @abstractmethod
    def build(
        self, section: ModelConfig, *, device: Any, dtype: str | torch.dtype | None, seed: int = 0
    ) -> tuple[Any, dict[str, Any]]:
        """The model that a section describes, in eval mode, and what was read from where, as plain data.

        Args:
            seed: Of tensors that start new.
        """

    @abstractmethod
    def set_max_length(self, model: Any, max_length: int) -> None:
        """Tells a model that cuts sequences itself where."""

    @abstractmethod
    def start_from(self, model: Any, stage: str, connector: Path | None, config: ExperimentConfig, seed: int) -> None:
        """The connector that a stage starts with: the aligned one, new weights, or the checkpoint's own."""

    @abstractmethod
    def make_trainable(self, model: Any, stage: str, config: ExperimentConfig, seed: int) -> TrainableSet:
        """Puts the adapter on, declares and asserts what is trained, and switches to training mode.

        Args:
            seed: Of the adapter.
        """

    @abstractmethod
    def loss_module(self, model: Any) -> nn.Module:
        """A module whose forward is ``(batch, normalizer) -> loss``, with the model as ``.model``."""

    @abstractmethod
    def to_be_written(self, model: Any, is_full: bool) -> list[nn.Parameter]:
        """Parameters that have to be whole on the process that saves."""

    @abstractmethod
    def save(self, model: Any, stage: str, is_full: bool, out: Path) -> None:
        """Writes what a stage leaves below ``out``: one of :data:`CONNECTOR`, :data:`ADAPTER`, :data:`MODEL`."""

    @abstractmethod
    def trained_section(self, section: ModelConfig, weights: Path | None) -> ModelConfig:
        """The section that describes what a stage left: the base's, or the whole model's where all was trained."""

    @abstractmethod
    def load_trained(
        self,
        section: ModelConfig,
        weights: Path | None,
        *,
        device: Any,
        dtype: str | torch.dtype | None,
        is_merged: bool = False,
    ) -> Any:
        """The model with what a stage left in ``weights`` (None: the base), in eval mode.

        Args:
            section: As :meth:`trained_section` gives it.
            is_merged: An adapter becomes part of the weights.
        """


def family_of(section: ModelConfig) -> Family:
    """The family of the model that a section describes."""
    if section.family is ModelFamily.hf:
        from mgm_exp.model.hf.family import HfFamily

        return HfFamily()
    from mgm_exp.model.mgm_family import MgmFamily

    return MgmFamily()
