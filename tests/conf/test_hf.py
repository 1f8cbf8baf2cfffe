"""What does not apply to other models is refused when the configuration is composed, with the key to change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mgm_exp.config import LEFT_OUT, ExperimentConfig, ModelFamily
from mgm_exp.errors import ConfigError

Compose = Callable[..., ExperimentConfig]


@pytest.mark.parametrize("adapter", ["full", "lora_r8", "lora_r16"])
@pytest.mark.parametrize("train", ["hf", "official"])
def test_other_models_compose_with_adapters_and_recipes(compose: Compose, adapter: str, train: str) -> None:
    config = compose("model=hf", f"adapter={adapter}", f"train={train}")
    assert config.model.family is ModelFamily.hf
    assert config.eval.benchmarks == ["textvqa"]
    assert config.name == f"hf-raw-{adapter}"


def test_it_brings_its_own_recipe_unless_one_is_given(compose: Compose) -> None:
    assert compose("model=hf").train.name == "hf"
    assert compose("model=hf", "train=official").train.name == "official"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.align.max_steps=10", "train.align.max_steps=10: .*no align stage.*train.align.max_steps=0"),
        ("train.align.lr=1e-4", "train.align.lr=0.0001: .*no align stage"),
        ("train.align.reset=connector", "train.align.reset=connector: .*no align stage"),
        ("train.freeze_connector=true", "train.freeze_connector=true belongs to MGM.*model.train_connector"),
        ("train.cache_visual_tokens=true", "train.cache_visual_tokens=false"),
        ("train.image_aspect=square", "train.image_aspect=square belongs to MGM.*own processor"),
        ("model.hidden_activation=gelu", "model.hidden_activation=gelu belongs to MGM"),
        ("model.vision_tower=/x", "model.vision_tower=/x belongs to MGM"),
        ("model.vision_tower_aux=/x", "model.vision_tower_aux=/x belongs to MGM"),
        ("data=blip2", "data=raw"),
        ("data.recipe.words_num.min=3", "data.recipe.words_num filters the rows of the align stage"),
        ("data.augment.duplicate=2", "data.augment adds rows to the align stage"),
        ("model.train_connector=true", "goes with adapter=full"),
        ("adapter.target_modules=[q.*]", "names of linear layers"),
    ],
)
def test_what_only_mgm_has_is_refused_with_the_key(compose: Compose, override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        compose("model=hf", "adapter=lora_r8", override)


def test_every_fault_of_the_demo_recipe_is_named_at_once(compose: Compose) -> None:
    with pytest.raises(ConfigError) as error:
        compose("model=hf", "train=demo")
    for key in ("train.align.max_steps=80", "train.freeze_connector", "train.cache_visual_tokens"):
        assert key in str(error.value)


def test_an_align_stage_that_is_switched_off_may_have_settings(compose: Compose) -> None:
    assert compose("model=hf", "debug=fast", "train.align.max_steps=0").train.align.max_steps == 0


def test_layers_of_other_names_may_be_adapted_in_other_models_only(compose: Compose) -> None:
    layers = "adapter.target_modules=[qkv_proj,o_proj]"
    assert compose("model=hf", "adapter=lora_r8", layers).adapter.target_modules == ["qkv_proj", "o_proj"]
    with pytest.raises(ConfigError, match="qkv_proj"):
        compose("adapter=lora_r8", layers)


def test_keys_of_other_models_are_refused_for_mgm(compose: Compose) -> None:
    with pytest.raises(ConfigError, match=r"model\.train_connector=true belongs to model=hf"):
        compose("model.train_connector=true")


def test_what_is_left_out_is_said_by_key(compose: Compose) -> None:
    config: Any = compose("model=hf")
    assert "train.align" in LEFT_OUT and config.train.align.max_steps is None
