"""Loading, saving and going on; main memory; disk: components of their own, by arithmetic."""

from __future__ import annotations

import pytest

from mgm_exp.config import ExperimentConfig
from mgm_exp.plan import CellPlan, plan_cell
from mgm_exp.plan.around import LOADING, RESUMING, SAVING, WRITING
from tests.plan.settings import config_of

GIB = 1024**3
MGM = ("model=mgm_2b", "plan.rows=17500", "plan.align_rows=17500", "plan.device=a100_80")
TRAINED, WHOLE, EMBEDDING = 2_519_431_424, 3_019_166_144, 256_000 * 2_048


def config(*overrides: str) -> ExperimentConfig:
    return config_of(*MGM, *overrides)


def planned(*overrides: str) -> CellPlan:
    return plan_cell(config(*overrides), with_advice=False)


def moments(plan: CellPlan) -> dict[str, float]:
    return {moment.name: moment.total for moment in plan.stages[-1].moments}


def test_plain_pytorch_loads_saves_and_goes_on_within_what_training_needs() -> None:
    found = moments(planned("adapter=full"))
    frozen = WHOLE - TRAINED
    assert found[LOADING] == 4 * TRAINED + 2 * frozen + 2 * EMBEDDING
    assert found[SAVING] == found[RESUMING] == 12 * TRAINED + 2 * frozen
    assert max(found[LOADING], found[SAVING]) < max(found.values())


def test_a_base_of_4_bits_is_loaded_in_16() -> None:
    short = ("train.max_length=640", "train.micro_batch_size=1", "train.freeze_connector=true")
    plan = planned("adapter=qlora", *short, "train.align.max_steps=0")
    found = moments(plan)
    assert found[LOADING] > 2 * WHOLE > found[SAVING]
    assert plan.stages[-1].peak.name == LOADING and any("packed on the card" in note for note in plan.notes)


def test_zero_3_has_the_whole_model_on_every_card_while_it_loads_and_writes() -> None:
    few, many = (moments(planned("adapter=full", "zero=3", f"devices={n}")) for n in (2, 8))
    assert few[LOADING] == many[LOADING] == 2 * WHOLE
    assert few[SAVING] > many[SAVING] > 3 * 4 * EMBEDDING
    assert many[WRITING] > 2 * WHOLE


def test_main_memory_has_its_components() -> None:
    plan = planned("adapter=full", "zero=2", "zero.offload_optimizer=cpu", "devices=2")
    host = plan.host_gib
    assert host["offload"] == pytest.approx(16 * TRAINED / GIB, rel=1e-3)
    assert host["checkpoint"] == pytest.approx(12 * TRAINED / GIB, rel=1e-3)
    assert host["resume"] == pytest.approx(2 * host["checkpoint"], rel=1e-3)
    steps = host["offload"] + host["batches"] + host["checkpoint"] + host["activations"]
    assert host["peak"] == pytest.approx(host["processes"] + max(steps, host["offload"] + host["resume"]), rel=1e-3)
    plain = planned("adapter=lora_r16", "model.gradient_checkpointing=false")
    waiting = planned("adapter=lora_r16", "model.gradient_checkpointing=false", "train.offload_activations=true")
    assert plain.host_gib["activations"] == 0 and waiting.host_gib["activations"] > 1
    assert waiting.stages[-1].peak.total < plain.stages[-1].peak.total


def test_too_little_main_memory_does_not_fit() -> None:
    full = ("adapter=full", "zero=2", "zero.offload_optimizer=cpu", "plan.device=rtx4090")
    assert planned(*full).verdict == "fits"
    found = planned(*full, "plan.host_memory_gib=32")
    assert found.verdict == "does not fit" and any("main memory" in note for note in found.notes)
    advised = plan_cell(config("adapter=full", "plan.device=rtx4090", "plan.host_memory_gib=32")).advice
    assert advised and not any("offload_optimizer" in line for line in advised)


def test_the_fused_optimizer_has_no_temporaries_and_fp16_has_none_of_it() -> None:
    step = "optimizer step"
    fused, halves = (moments(planned("adapter=full", *extra)) for extra in ((), ("train.precision=fp16",)))
    assert halves[step] - fused[step] == 4 * 2_506_172_416


def test_disk_counts_checkpoints_curated_rows_and_captions() -> None:
    plan = planned("adapter=lora_r16", "train.validation.every_steps=50")
    trained = plan.stages[-1].parameters.trainable
    assert plan.disk["checkpoints"] == pytest.approx((5 + 1 + 1) * 12 * trained / GIB, rel=1e-2)
    assert plan.disk["curated"] == pytest.approx(35_000 * (200 + 4.3 * 124) / GIB, rel=1e-2)
    assert plan.disk["demo"] == 0 and plan.disk_gib == pytest.approx(sum(plan.disk.values()))
    assert plan_cell(config_of(), with_advice=False).disk["demo"] == pytest.approx(3000 * 34_000 / GIB, rel=1e-2)


def test_features_that_are_kept_are_not_computed_in_a_second_epoch() -> None:
    base = ("adapter=lora_r16", "train.epochs=3")

    def flops(*overrides: str) -> float:
        return planned(*base, *overrides).stages[-1].flops or 0.0

    plain, clip, towers = flops(), flops("train.feature_cache=clip"), flops("train.feature_cache=towers")
    assert plain > clip > towers
    once = planned("adapter=lora_r16", "train.feature_cache=towers").stages[-1].flops
    # Each image is seen once, but for those that fill the last batch
    assert once == pytest.approx(planned("adapter=lora_r16").stages[-1].flops, rel=1e-3)
    half = flops("train.feature_cache=towers", "train.feature_cache_gb=464")
    assert towers < half < plain, "the budget holds a part of them"
