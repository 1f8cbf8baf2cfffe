"""MGM as a family: two stages, a connector that the first one trains, images of two resolutions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgm_exp.config import ExperimentConfig, ModelConfig
from mgm_exp.model.family import ADAPTER, CONNECTOR, MODEL, Family

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mgm_exp.model.trainable import TrainableSet


class MgmFamily(Family):
    """See :class:`Family`."""

    def processor(self, section: ModelConfig, max_length: int | None, stage: str = "instruct") -> Any:
        from mgm_exp.model.folders import source_of_section
        from mgm_exp.model.processor import processor_of

        return processor_of(source_of_section(vars(section)), max_length, stage)

    def build(
        self, section: ModelConfig, *, device: Any, dtype: str | torch.dtype | None, seed: int = 0
    ) -> tuple[Any, dict[str, Any]]:
        from mgm_exp.model.loading import build_model

        model, report = build_model(section, device=device, dtype=dtype, seed=seed)
        return model, json.loads(json.dumps(report.to_dict()))  # tuples as lists, as they come back from a file

    def set_max_length(self, model: Any, max_length: int) -> None:
        model.config.tokenizer_model_max_length = max_length

    def start_from(self, model: Any, stage: str, connector: Path | None, config: ExperimentConfig, seed: int) -> None:
        from mgm_exp.model.adapters import load_connector, reset_connector

        if connector is not None:
            load_connector(model, connector)
        if stage == "align":
            reset_connector(model, config.train.align.reset.value, seed)

    def make_trainable(self, model: Any, stage: str, config: ExperimentConfig, seed: int) -> TrainableSet:
        from mgm_exp.model.adapters import apply_adapter
        from mgm_exp.model.trainable import set_trainable

        if stage == "instruct":
            apply_adapter(model, config.adapter, seed)
        trainable = set_trainable(
            model,
            stage,
            config.adapter,
            config.train.freeze_connector,
            vision_tower=config.train.optimize_vision_tower,
            vision_tower_aux=config.train.optimize_vision_tower_aux,
        )
        model.train()
        return trainable

    def loss_module(self, model: Any) -> nn.Module:
        from mgm_exp.model.mgm import LossModule

        return LossModule(model)

    def to_be_written(self, model: Any, is_full: bool) -> list[nn.Parameter]:
        """The whole model, or what was trained and the connector (which goes beside an adapter, frozen or not)."""
        from mgm_exp.model.tensors import official_name
        from mgm_exp.model.trainable import connector_names

        connector = connector_names()
        return [
            parameter
            for name, parameter in model.named_parameters()
            if is_full or parameter.requires_grad or official_name(name) in connector
        ]

    def save(self, model: Any, stage: str, is_full: bool, out: Path) -> None:
        from mgm_exp.model.adapters import save_adapter, save_connector, save_full

        if stage == "align":
            save_connector(model, out / CONNECTOR)
        elif is_full:
            save_full(model, out / MODEL)
        else:
            save_adapter(model, out / ADAPTER)

    def trained_section(self, section: ModelConfig, weights: Path | None) -> ModelConfig:
        if weights is None or not (weights / MODEL).is_dir():
            return section
        # A full folder holds LLM, connector and towers; only the activation and attention are still the section's
        return replace(section, path=str(weights / MODEL), vision_tower=None, vision_tower_aux=None)

    def load_trained(
        self,
        section: ModelConfig,
        weights: Path | None,
        *,
        device: Any,
        dtype: str | torch.dtype | None,
        is_merged: bool = False,
    ) -> Any:
        from mgm_exp.model.adapters import load_adapter, load_connector, merge_adapter

        model, _ = self.build(section, device=device, dtype=dtype)
        put_in = merge_adapter if is_merged else load_adapter
        if weights is not None and (weights / "adapter_config.json").is_file():
            put_in(model, weights)  # an adapter folder of anybody's
        elif weights is not None and (weights / ADAPTER).is_dir():
            put_in(model, weights / ADAPTER)
        elif weights is not None and (weights / CONNECTOR).is_file():
            load_connector(model, weights / CONNECTOR)
        model.eval()
        return model
