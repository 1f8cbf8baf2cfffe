"""What does not compose is explained in one paragraph: what was given, what is allowed, what was perhaps meant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mgm_exp.config import ExperimentConfig
from mgm_exp.errors import ConfigError
from mgm_exp.spelling import known_keys

CASES = [
    ("train.lrr=1", ["'train.lrr'", "Did you mean train.lr"]),
    ("+train.lrr=1", ["train.lrr", "+"]),
    ("lr=1e-4", ["Did you mean", "train.lr", "train.align.lr"]),
    ("train.align.lrr=1", ["train.align.lr", "warmup_ratio"]),
    ("models=tiny", ["Did you mean model"]),
    ("foo=1", ["'foo'", "at the top", "devices"]),
    ("+foo.bar=1", ["'foo'"]),
    ("adapter=lora_r17", ["'lora_r17'", "lora_r16, lora_r32", "Did you mean adapter=lora_r16"]),
    ("zero=4", ["'4'", "2, 3, none"]),
    ("train=5", ["'5'", "demo, hf, official"]),
    ("train=null", ["'null'", "demo, hf, official"]),
    ("+sweeps=ablatoin", ["Did you mean sweeps=ablation"]),
    ("hydra/launcher=nope", ["hydra/launcher", "basic"]),
    ("train.lr=abc", ["train.lr takes a number", "'abc'"]),
    ("devices=two", ["devices takes a whole number"]),
    ("adapter.rank=8.5", ["adapter.rank takes a whole number"]),
    ("train.precision=bf17", ["one of bf16, fp16, fp32"]),
    ("eval.benchmarks=demo", ["a list in brackets"]),
    ("eval.textvqa.ocr_tokens=maybe", ["true or false"]),
    ("train.align=3", ["a section with the keys lr"]),
    ("data.max_samples=many", ["a whole number, or null"]),
    ("seed=null", ["seed takes a whole number"]),
    ("train.lr=${nope}", ["train.lr=${nope}", "nope"]),
    ("~train", ["train has no value"]),
    ("status", ["KEY=VALUE", "mgm-exp"]),
    ("train.lr=[1", ["cannot be read"]),
    ("adapter=lora_r8,lora_r16", ["more than one value", "-m", "adapter=[lora_r8,lora_r16]"]),
    ("train.lr=interval(1,2)", ["more than one value", "-m"]),
    ("+experiment=mgm_2b_lora_24gb", ["drop the +"]),
    ("hydra.sweper=3", ["hydra.sweper"]),
]


@pytest.mark.parametrize(("override", "says"), CASES, ids=[case[0] for case in CASES])
def test_a_mistake_is_named_with_what_is_allowed(
    compose: Callable[..., ExperimentConfig], override: str, says: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(override)
    message = str(caught.value)
    for part in says:
        assert part in message
    assert "\n" not in message, "one paragraph"
    for internal in ("full_key", "object_type", "ConfigStore", "Traceback", "omegaconf"):
        assert internal not in message


def test_the_schema_names_every_key_that_others_rely_on() -> None:
    keys = known_keys()
    relied_on = (
        "seed name devices model.path model.vision_tower model.vision_tower_aux data.path data.image_root "
        "data.captioner.path adapter.rank adapter.alpha adapter.dropout adapter.target_modules train.lr "
        "train.projector_lr train.epochs train.max_steps train.global_batch_size train.micro_batch_size "
        "train.warmup_ratio train.max_length train.precision train.checkpoint.every_steps "
        "train.checkpoint.every_minutes train.checkpoint.keep eval.benchmarks eval.textvqa.questions "
        "eval.textvqa.annotations eval.textvqa.images eval.textvqa.ocr_tokens eval.textvqa.batch_size tracker.mode "
        "tracker.project tracker.entity paths.root paths.store sweep.name sweep.objective sweep.direction sweep.rerun"
    )
    assert [key for key in relied_on.split() if key not in keys] == []


UNSAFE = [
    "hydra.callbacks.x._target_=os.system",
    "+hydra.callbacks.x._target_=pathlib.Path.touch",
    "+hydra.callbacks={x: {_target_: pathlib.Path.touch}}",
    "hydra/callbacks=anything",
    "hydra.sweeper._target_=subprocess.Popen",
    "hydra.launcher._target_=subprocess.Popen",
    "+train._target_=os.system",
    "+model={_target_: os.system}",
    "hydra.job_logging.handlers.console.class=subprocess.Popen",
    "+hydra.job_logging.formatters.simple.()=os.system",
]


@pytest.mark.parametrize("override", UNSAFE)
def test_an_override_cannot_name_what_is_to_be_called(compose_tree: Callable[..., Any], override: str) -> None:
    with pytest.raises(ConfigError):
        compose_tree(override)


SECRET = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    "override",
    [
        f"+hydra.job.env_set.WANDB_API_KEY={SECRET}",
        f"tracker.base_url=https://me:{SECRET}@wandb.example.org",
        "+tracker.api_key=x",
    ],
)
def test_a_secret_is_not_taken_and_not_repeated(compose_tree: Callable[..., Any], override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_tree(override)
    assert SECRET not in str(caught.value)
    assert "environment" in str(caught.value)


def test_the_value_of_a_secret_variable_is_recognised_anywhere(
    compose_tree: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    with pytest.raises(ConfigError, match="secret"):
        compose_tree(f"tracker.entity={SECRET}")


def test_keys_that_only_look_secret_are_taken(compose: Callable[..., ExperimentConfig]) -> None:
    config = compose("eval.textvqa.max_new_tokens=64", "eval.textvqa.ocr_tokens=false")
    assert config.eval.textvqa.max_new_tokens == 64
