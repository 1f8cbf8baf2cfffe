"""Every kind of adapter through the real loop: what it declares is verified; a stopped run continues bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from mgm_exp.config import (
    BOTTLENECK_PLACES,
    AdaLoraConfig,
    AdapterConfig,
    AdapterInit,
    AdapterKind,
    Precision,
    from_plain,
    plain,
)
from mgm_exp.train import TrainJob, run_stage
from mgm_exp.train.metrics_file import read_rows

from .conftest import lora

MakeJob = Callable[..., TrainJob]
ADALORA = AdaLoraConfig(initial_rank=6, warmup_share=0.0, final_share=0.5, orthogonality=0.1)
KINDS: dict[str, AdapterConfig] = {
    "dora-rslora": replace(lora(0.1), use_dora=True, use_rslora=True),
    "pissa-lora+": replace(lora(), init=AdapterInit.pissa, pissa_iterations=8, b_lr_ratio=4.0),
    "adalora": replace(lora(), kind=AdapterKind.adalora, adalora=ADALORA),
    "loha": replace(lora(), kind=AdapterKind.loha),
    "vera": replace(lora(), kind=AdapterKind.vera, rank=16, alpha=0.0),
    "prompt": AdapterConfig("prompt", AdapterKind.prompt, tokens=3),
    "prefix": AdapterConfig("prefix", AdapterKind.prefix, tokens=3),
    "bottleneck": AdapterConfig("bottleneck", AdapterKind.bottleneck, 4, target_modules=list(BOTTLENECK_PLACES)),
    "bitfit": AdapterConfig("bitfit", AdapterKind.bitfit, norms=True),
}


def losses(job: TrainJob) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_rows(job.metrics) if "event" not in row]


def written(job: TrainJob) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (job.out / "adapter").iterdir()}


@pytest.mark.parametrize("name", KINDS)
def test_a_stopped_run_continues_bit_for_bit(name: str, make_job: MakeJob) -> None:
    settings: dict[str, Any] = {"adapter": KINDS[name], "steps": 4, "every_steps": 2, "global_batch": 2}
    whole = make_job(name="whole", **settings)
    summary = run_stage(whole)
    verified = summary.trainable["verified"]
    assert verified["is_complete"] and verified["frozen_check"] == "every element"
    assert summary.trainable["n_lora" if name != "bitfit" else "n_other"] > 0

    shutil.copytree(whole.work, whole.work.with_name("stopped"))
    stopped = replace(whole, work=whole.work.with_name("stopped"))
    shutil.rmtree(stopped.checkpoints / "step-000004")
    shutil.rmtree(stopped.out)
    assert run_stage(stopped).resumed_from == [2]
    assert losses(stopped) == losses(whole) and len(losses(whole)) == 4
    assert written(stopped) == written(whole)


def test_half_precision_and_weight_decay_are_for_every_group(make_job: MakeJob) -> None:
    """bf16 under autocast, LoRA+'s two rates, decay, towers: each group learns at its own rate."""
    adapter = replace(lora(), b_lr_ratio=8.0)
    job = make_job(name="groups", adapter=adapter, steps=2, global_batch=2, precision=Precision.bf16)
    config = from_plain(job.config)
    config.train.optimize_vision_tower = config.train.optimize_vision_tower_aux = True
    config.train.weight_decay, config.train.vision_tower_lr = 0.1, 1e-4
    summary = run_stage(replace(job, config=plain(config)))
    assert summary.trainable["verified"]["is_complete"]
    assert any("vision_stages" in pattern for pattern in summary.trainable["patterns"])
    names = set(json.loads(json.dumps(sorted(written(job)))))
    assert names == {"adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.safetensors"}
