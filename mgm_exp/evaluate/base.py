"""A base that is loaded once, and the models that adapters make of it: they share all tensors but their own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from mgm_exp.config import ExperimentConfig, ModelFamily
from mgm_exp.errors import ModelError
from mgm_exp.evaluate.answerer import Answerer, MgmAnswerer
from mgm_exp.evaluate.weights import load_weights, processor_for
from mgm_exp.evaluate.whole_inputs import answerer_of
from mgm_exp.model.family import ADAPTER, CONNECTOR, MODEL


def shares_base(weights: Path | None, *, is_merged: bool = False) -> bool:
    """Whether weights can be put beside a base that others use too.

    So it is for the base itself, for a connector, and for adapters of every kind that put tensors of their own beside
    the base's. BitFit and trained towers write into the base's, and a full fine-tuning is a base of its own.

    Args:
        is_merged: An adapter becomes part of the weights: so many would be in memory as there are adapters.
    """
    if weights is None or (not (weights / MODEL).is_dir() and not (weights / ADAPTER).is_dir()):
        return True
    if (weights / MODEL).is_dir() or is_merged:
        return False
    from mgm_exp.model.adapters import changes_base

    try:
        return not changes_base(weights / ADAPTER)
    except ModelError:
        return False  # loading it says what is wrong


class Base:
    """The base that a configuration describes, loaded when it is first needed.

    Args:
        config: Its ``model`` section, precision and longest row.
        device: ``cpu``, ``cuda`` or ``cuda:1``.
    """

    def __init__(self, config: ExperimentConfig, device: str) -> None:
        self._config, self._device = config, device
        self._loaded: tuple[Any, Any] | None = None
        self._made: dict[Path | None, Answerer] = {}
        self._whole: tuple[Path | None, Answerer] | None = None
        self._processor: Any = None

    def processor(self, weights: Path | None) -> Any:
        """The processor of these weights; no weights are read for it."""
        if weights is not None and (weights / MODEL).is_dir():
            return processor_for(self._config, weights)
        if self._processor is None:
            self._processor = processor_for(self._config, None)
        return self._processor

    def answerer(self, weights: Path | None) -> Answerer:
        """The model of these weights. Those that share the base are kept, and the last of those that do not."""
        is_alone = not shares_base(weights, is_merged=self._config.eval.merge_adapter)
        if self._config.model.family is not ModelFamily.mgm or is_alone:
            if self._whole is None or self._whole[0] != weights:
                self._whole = None  # let go of the one before first
                self._whole = weights, answerer_of(*load_weights(self._config, weights, self._device))
            return self._whole[1]
        if weights not in self._made:
            self._made[weights] = self._make(weights)
        return self._made[weights]

    def _make(self, weights: Path | None) -> Answerer:
        from mgm_exp.model import load_adapter, load_connector

        if self._loaded is None:
            self._loaded = load_weights(self._config, None, self._device)
        base, processor = self._loaded
        if weights is None:
            return MgmAnswerer(base, processor)
        model = _twin(base)
        if (weights / ADAPTER).is_dir():
            load_adapter(model, weights / ADAPTER)
        elif (weights / CONNECTOR).is_file():
            load_connector(model, weights / CONNECTOR)
        return MgmAnswerer(model.eval(), processor)


def _twin(base: Any) -> Any:
    """The same model once more: towers and the LLM's tensors are the base's, the connector's are copies."""
    from mgm_exp.model.trainable import connector_names

    own = connector_names()
    shared: list[Any] = [tensor for name, tensor in base.named_parameters() if name not in own]
    shared += [*base.buffers(), base.model.vision_tower, base.model.vision_tower_aux]
    return copy.deepcopy(base, {id(thing): thing for thing in shared})
