"""One base for several trials: each has modules, configuration and connector of its own, and shares what is frozen."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from mgm_exp.config import ExperimentConfig
from mgm_exp.train.assemble import build_base
from mgm_exp.train.job import StageSettings, derived_seed
from mgm_exp.train.ranks import Ranks


class SharedBase:
    """Loads the base once, and gives each trial a model of its own over the same frozen tensors."""

    def __init__(self) -> None:
        self._model: Any = None
        self._report: dict[str, Any] = {}

    def build(self, config: ExperimentConfig, settings: StageSettings, ranks: Ranks) -> tuple[Any, dict[str, Any]]:
        """As :func:`mgm_exp.train.assemble.build_base`; all trials agree in what the base is made from."""
        from mgm_exp.model import family_of

        if self._model is None:
            self._model, self._report = build_base(config, settings, ranks)
        model = self.view()
        family_of(config.model).set_max_length(model, settings.max_length)
        _start_anew(model, self._report["initialised"], derived_seed(config.seed, "new weights"))
        return model, copy.deepcopy(self._report)

    def view(self) -> Any:
        """Another model over the same tensors; those of the connector, which trials train, are copies."""
        from mgm_exp.model import official_name
        from mgm_exp.model.trainable import connector_names

        own = connector_names()
        shared: list[torch.Tensor] = [p for n, p in self._model.named_parameters() if official_name(n) not in own]
        shared += self._model.buffers()
        return copy.deepcopy(self._model, {id(tensor): tensor for tensor in shared})


def _start_anew(model: nn.Module, names: list[str], seed: int) -> None:
    """First values of connector tensors that the checkpoint does not hold: they depend on the trial's seed."""
    from mgm_exp.model import official_name
    from mgm_exp.model.loading import connector_start

    parameters = {official_name(name): parameter for name, parameter in model.named_parameters()}
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    with torch.no_grad():
        for name in names:
            parameters[name].copy_(connector_start(name, shapes, seed))
