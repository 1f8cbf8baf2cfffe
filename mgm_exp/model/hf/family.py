"""Models of transformers as a family: one stage (instruct), inputs as their own processors make them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgm_exp.config import ExperimentConfig, ModelConfig
from mgm_exp.errors import ModelError
from mgm_exp.model.family import ADAPTER, MODEL, Family

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mgm_exp.model.trainable import TrainableSet


class HfFamily(Family):
    """See :class:`Family`."""

    def processor(self, section: ModelConfig, max_length: int | None, stage: str = "instruct") -> Any:
        from mgm_exp.model.hf.loading import open_processor

        return open_processor(_folder(section), max_length)

    def build(
        self, section: ModelConfig, *, device: Any, dtype: str | torch.dtype | None, seed: int = 0
    ) -> tuple[Any, dict[str, Any]]:
        from mgm_exp.model.hf.loading import build_hf

        return build_hf(vars(replace(section, path=str(_folder(section)))), device=device, dtype=dtype)

    def set_max_length(self, model: Any, max_length: int) -> None:
        """The processor cuts."""

    def start_from(self, model: Any, stage: str, connector: Path | None, config: ExperimentConfig, seed: int) -> None:
        """The folder's connector is there already."""

    def make_trainable(self, model: Any, stage: str, config: ExperimentConfig, seed: int) -> TrainableSet:
        from mgm_exp.model.hf.trainable import put_adapter_on, set_trainable, training_mode

        assert stage == "instruct", stage
        parts = put_adapter_on(model, config.adapter, seed)
        trainable = set_trainable(model, parts, config.adapter, config.model.train_connector)
        training_mode(model)
        return trainable

    def loss_module(self, model: Any) -> nn.Module:
        from mgm_exp.model.hf.loss import HfLossModule

        return HfLossModule(model)

    def to_be_written(self, model: Any, is_full: bool) -> list[nn.Parameter]:
        return [parameter for parameter in model.parameters() if is_full or parameter.requires_grad]

    def save(self, model: Any, stage: str, is_full: bool, out: Path) -> None:
        from mgm_exp.model.hf.saving import save_hf_adapter, save_hf_model

        if is_full:
            save_hf_model(model, out / MODEL)
        else:
            save_hf_adapter(model, out / ADAPTER)

    def trained_section(self, section: ModelConfig, weights: Path | None) -> ModelConfig:
        is_whole = weights is not None and (weights / MODEL).is_dir()
        return replace(section, path=str(weights / MODEL)) if weights is not None and is_whole else section

    def load_trained(
        self,
        section: ModelConfig,
        weights: Path | None,
        *,
        device: Any,
        dtype: str | torch.dtype | None,
        is_merged: bool = False,
    ) -> Any:
        from mgm_exp.model.hf.saving import load_hf_adapter, merge_hf_adapter

        model, _ = self.build(section, device=device, dtype=dtype)
        if weights is not None and (weights / ADAPTER).is_dir():
            (merge_hf_adapter if is_merged else load_hf_adapter)(model, weights / ADAPTER)
        model.eval()
        return model


def _folder(section: ModelConfig) -> Path:
    if section.path is None:
        raise ModelError("model=hf needs a model's folder.", advice="Give model.path=DIR.")
    return Path(section.path).expanduser()
