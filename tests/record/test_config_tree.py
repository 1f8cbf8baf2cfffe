"""The configuration on one screen."""

from __future__ import annotations

import io

from rich.console import Console

from mgm_exp.config import AdapterConfig, AdapterKind
from mgm_exp.record import config_tree

CONFIG = {
    "name": "demo",
    "seed": 0,
    "adapter": {"name": "lora_r8", "rank": 8, "target_modules": ["q_proj", "v_proj"]},
    "train": {"name": "demo", "lr": 2e-4, "align": {"lr": 1e-3, "max_steps": None}, "freeze_connector": True},
    "tracker": {"api_key": "canary", "base_url": "https://me:canary@host"},
}


def shown(config: object) -> str:
    out = io.StringIO()
    config_tree(config, Console(file=out, width=120))
    return out.getvalue()


def test_every_key_is_shown_once_with_its_value_as_it_would_be_typed() -> None:
    text = shown(CONFIG)
    for part in (
        "seed=0",
        "adapter = lora_r8",
        "rank=8",
        "target_modules=[q_proj,v_proj]",
        "lr=0.0002",
        "max_steps=null",
        "freeze_connector=true",
    ):
        assert text.count(part) == 1, part


def test_there_are_no_secrets_in_it() -> None:
    assert "canary" not in shown(CONFIG)


def test_typed_configs_are_shown_like_plain_ones() -> None:
    text = shown(AdapterConfig(name="lora_r16", kind=AdapterKind.lora, rank=16))
    assert "kind=lora" in text
    assert "rank=16" in text
