"""Which runs train together, and how many share a pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mgm_exp.config import ExperimentConfig
from mgm_exp.packed.fit import needs_of, packs_of
from mgm_exp.packed.stories import Run
from mgm_exp.train.pack.compatible import likeness, why_alone

Compose = Callable[..., ExperimentConfig]


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["adapter=lora_r8"], None),
        (["adapter=lora_r8", "adapter.use_rslora=true", "adapter.b_lr_ratio=4"], None),
        (["adapter=full"], "only LoRA"),
        (["adapter=lora_r8", "adapter.use_dora=true"], "use_dora"),
        (["adapter=lora_r8", "adapter.init=pissa"], "pissa"),
        (["adapter=lora_r8", "zero=2"], "zero=2"),
        (["adapter=lora_r8", "devices=2"], "devices=2"),
        (["adapter=lora_r8", "train.auto_micro_batch=true"], "auto_micro_batch"),
        (["adapter=lora_r8", "train.padding_free=true"], "padding_free"),
        (["adapter=lora_r8", "train.loss_kernel=fused"], None),
    ],
)
def test_who_trains_alone(compose: Compose, overrides: list[str], why: str | None) -> None:
    found = why_alone(compose("device=cpu", *overrides))
    assert found is None if why is None else why in (found or "")


def test_what_belongs_to_one_trial_does_not_part_it_from_others(compose: Compose) -> None:
    base = likeness(compose("adapter=lora_r8"))
    assert base == likeness(
        compose("adapter=lora_r16", "adapter.dropout=0.1", "train.lr=1e-2", "seed=5", "train.max_steps=3")
    )
    for other in (
        "train.micro_batch_size=1",
        "train.precision=bf16",
        "model.attn_implementation=eager",
        "train.tf32=true",
        "train.block_kernel=fused",
        "train.cuda_graphs=packs",
    ):
        assert base != likeness(compose("adapter=lora_r8", other))


def test_as_many_share_a_pass_as_memory_holds(compose: Compose) -> None:
    config = compose("model=mgm_2b", "model.path=/m", "adapter=lora_r16")
    runs = [Run(config, Path(str(number)), [], [], None) for number in range(8)]
    one, said = needs_of(config), list[str]()
    assert 5 < one.base < 7
    assert one.state < 2
    (pack,) = packs_of(runs, said.append, one.base + 8 * one.state + 3.5 * one.passing)
    assert (len(pack.runs), pack.width) == (8, 3)
    assert "3 share a pass" in said[0]
    packs = packs_of(runs, said.append, one.base + 5.5 * one.state + one.passing)
    assert [(len(pack.runs), pack.width) for pack in packs] == [
        (5, 1),
        (3, 3 if 2.5 * one.state >= 2 * one.passing else 1),
    ]
    assert [pack.runs for pack in packs_of(runs, said.append, 1000.0)] == [runs]
