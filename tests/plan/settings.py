"""Configurations for many cases: groups are composed once, other keys are set in a copy, and all is validated."""

from __future__ import annotations

import copy
from enum import Enum
from functools import lru_cache
from typing import Any

import yaml

from mgm_exp.compose import compose
from mgm_exp.config import CorruptionKind, ExperimentConfig, validate

_GROUPS = ("model", "adapter", "data", "eval", "train")


def config_of(*overrides: str) -> ExperimentConfig:
    """What the overrides compose to."""
    pairs = [item.partition("=")[::2] for item in overrides]
    config = copy.deepcopy(_composed(tuple(f"{key}={value}" for key, value in pairs if key in _GROUPS)))
    for key, value in pairs:
        if key not in _GROUPS:
            _set(config, "zero.stage" if key == "zero" else key, value)
    validate(config)
    return config


@lru_cache(maxsize=32)
def _composed(groups: tuple[str, ...]) -> ExperimentConfig:
    return compose(list(groups))


def _set(config: Any, key: str, text: str) -> None:
    *path, name = key.split(".")
    for part in path:
        config = getattr(config, part)
    old, value = getattr(config, name), yaml.safe_load(text)
    if isinstance(old, Enum):
        value = type(old)(text)
    if name == "corruptions":
        value = [CorruptionKind(one) for one in value]
    setattr(config, name, value)
