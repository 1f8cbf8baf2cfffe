"""What a configuration of another model (``model=hf``) may not ask for: each key that only MGM has, with the reason."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from mgm_exp.config.as_json import plain
from mgm_exp.config.choices import AdapterKind, Aspect, FeatureTier, ModelFamily
from mgm_exp.config.data import RECIPE_OPERATORS, AugmentConfig, RecipeConfig
from mgm_exp.config.model import AdapterConfig, ModelConfig
from mgm_exp.config.train import AlignConfig

if TYPE_CHECKING:
    from mgm_exp.config.experiment import ExperimentConfig

_MODEL_KEYS = {"name", "path", "attn_implementation", "gradient_checkpointing", "family", "train_connector"}
_ADAPTER_KEYS = {"name", "kind", "rank", "alpha", "dropout", "target_modules"}
_LAYER = re.compile(r"[A-Za-z_]\w*")
LEFT_OUT = (
    "the align stage (train.align), train.freeze_connector, train.cache_visual_tokens, train.image_aspect, "
    "model.vision_tower(_aux), model.hidden_activation"
)
"""What a run of another model goes without, for the log."""


def hf_faults(config: ExperimentConfig) -> Iterator[str]:
    """Faults of a configuration with ``model.family=hf``; of one without it, the keys that only such a one has."""
    model, train, data = config.model, config.train, config.data
    if model.family is not ModelFamily.hf:
        if model.train_connector:
            yield (
                "model.train_connector=true belongs to model=hf; MGM's connector is trained unless "
                "train.freeze_connector=true says otherwise"
            )
        return
    for key in _changed(model, ModelConfig, _MODEL_KEYS):
        yield f"model.{key}={getattr(model, key)} belongs to MGM; model=hf obeys the model's own config: drop it"
    asked = list(_changed(train.align, AlignConfig, set()))
    if asked and train.align.max_steps != 0:
        keys = ", ".join(f"train.align.{key}={plain(getattr(train.align, key))}" for key in asked)
        yield (
            f"{keys}: model=hf has no align stage, its connector has learnt already; give train.align.max_steps=0, or "
            "train=hf"
        )
    if train.freeze_connector:
        yield (
            "train.freeze_connector=true belongs to MGM; with model=hf the connector is frozen unless "
            "model.train_connector=true: drop it, or give train=hf"
        )
    if train.cache_visual_tokens:
        yield (
            "train.cache_visual_tokens=true belongs to MGM; model=hf computes images in every step: give "
            "train.cache_visual_tokens=false, or train=hf"
        )
    if train.feature_cache is not FeatureTier.none or train.resized_cache_gb:
        yield (
            "train.feature_cache and train.resized_cache_gb keep what MGM's towers and processor make of images; "
            "model=hf computes images in every step: drop them"
        )
    if train.image_aspect is not Aspect.pad:
        yield (
            f"train.image_aspect={train.image_aspect.value} belongs to MGM; with model=hf the model's own processor "
            "shapes images: drop it"
        )
    for key in ("optimize_vision_tower", "optimize_vision_tower_aux"):
        if getattr(train, key):
            yield f"train.{key}=true is for MGM's towers; model=hf leaves its vision tower as it is: drop it"
    if data.recaption:
        yield "data.recaption=true (data=blip2) rewrites the rows of the align stage, which model=hf has not: data=raw"
    for name in RECIPE_OPERATORS:
        if getattr(data.recipe, name) != getattr(RecipeConfig(), name):
            yield f"data.recipe.{name} filters the rows of the align stage, which model=hf has not: drop it"
    if data.augment != AugmentConfig():
        yield "data.augment adds rows to the align stage, which model=hf has not: drop it"
    yield from _adapter_faults(config)


def _adapter_faults(config: ExperimentConfig) -> Iterator[str]:
    adapter = config.adapter
    if adapter.kind not in (AdapterKind.full, AdapterKind.lora):
        yield f"adapter.kind={adapter.kind.value} is made for MGM's LLM; with model=hf use full or lora"
    for key in _changed(adapter, AdapterConfig, _ADAPTER_KEYS):
        yield f"adapter.{key}={getattr(adapter, key)} is made for MGM's LLM and cannot be used with model=hf: drop it"
    if config.model.train_connector and adapter.kind is not AdapterKind.full:
        yield (
            "model.train_connector=true goes with adapter=full: an adapter folder holds LoRA alone, so that PEFT can "
            "load it; drop it, or give adapter=full"
        )
    wrong = [name for name in adapter.target_modules if not _LAYER.fullmatch(name)]
    if wrong:
        yield f"adapter.target_modules has {wrong}: with model=hf they are names of linear layers of the LLM"


def _changed(section: Any, kind: Any, known: set[str]) -> Iterator[str]:
    """Fields that are not at the default of their type, leaving out those that are known to apply."""
    for field in fields(kind):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if field.name not in known and getattr(section, field.name) != default:
            yield field.name
