"""Predicted memory against what PyTorch counts: on the tiny model with real tensors, at the size of MGM-2B without."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.accounting import LiveMemory
from benchmarks.plan_memory import cases, compared
from mgm_exp.config import AdapterConfig, AdapterKind, ModelConfig
from mgm_exp.model import apply_adapter, load_model, meta_model, official_name, set_trainable
from mgm_exp.plan import Work, architecture_of, moments, parameters_of
from mgm_exp.plan.activations import layers
from mgm_exp.plan.architecture import part_of, targets_of
from mgm_exp.plan.memory import held, peak

GIB = 1024**3
TINY = Path(__file__).parents[2] / "mgm_exp" / "model" / "tiny"
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FULL = AdapterConfig("full", AdapterKind.full)
MGM_2B = ModelConfig("mgm_2b")


def lora(rank: int, modules: list[str] = SEVEN, dropout: float = 0.0) -> AdapterConfig:
    return AdapterConfig("lora", AdapterKind.lora, rank, 2 * rank, dropout, list(modules))


@pytest.mark.parametrize(
    ("stage", "adapter", "is_frozen"),
    [
        ("align", lora(8), False),
        ("instruct", lora(8), False),
        ("instruct", lora(3, ["q_proj", "down_proj"]), True),
        ("instruct", FULL, False),
        ("instruct", FULL, True),
    ],
)
def test_counts_are_those_of_the_model_that_is_trained(stage: str, adapter: AdapterConfig, is_frozen: bool) -> None:
    sizes = architecture_of(ModelConfig("tiny"))
    model: Any = meta_model(load_model(TINY).config)
    if stage == "instruct":
        apply_adapter(model, adapter, 0)
    trained = set_trainable(model, stage, adapter, is_frozen)
    found = parameters_of(sizes, stage, adapter, is_connector_frozen=is_frozen)
    assert (found.lora, found.trainable) == (trained.n_lora, trained.n_lora + trained.n_other)
    assert found.total == sum(parameter.numel() for parameter in model.parameters())
    parts = dict.fromkeys(("llm", "vision_tower", "vision_tower_aux", "mining", "projector"), 0)
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            parts[part_of(official_name(name))] += parameter.numel()
    assert {part: getattr(found, part) for part in parts} == parts


def test_mgm_2b_has_the_published_numbers() -> None:
    """3,019,166,144 parameters; trained are 13,259,008 in stage 1, 2,519,431,424 or a LoRA and these in stage 2."""
    sizes = architecture_of(MGM_2B)
    full = parameters_of(sizes, "instruct", FULL, is_connector_frozen=False)
    assert (full.total, full.trainable, full.llm) == (3_019_166_144, 2_519_431_424, 2_506_172_416)
    assert parameters_of(sizes, "align", FULL, is_connector_frozen=False).trainable == 13_259_008
    ranks = {8: 9_805_824, 16: 19_611_648, 64: 78_446_592}
    assert {r: parameters_of(sizes, "instruct", lora(r), is_connector_frozen=True).trainable for r in ranks} == ranks


CHOSEN = ("LoRA r=16, frozen connector, 2 samples", "full, checkpointing")
CASES = [pytest.param(row[0], marks=[] if row[0] in CHOSEN else pytest.mark.slow) for row in cases()]


@pytest.mark.parametrize("name", CASES)
def test_at_the_size_of_mgm_2b_it_is_near_what_pytorch_counts(name: str) -> None:
    adapter, work = next((adapter, work) for case, adapter, work in cases() if case == name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of hooks on modules whose input needs no gradient
        predicted, counted = compared(adapter, work)
    assert predicted == pytest.approx(counted, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "switches"),
    [
        ("LoRA r=16, checkpointing", {"blocks": 6}),
        ("LoRA r=16, checkpointing", {"blocks": 12, "batch": 2}),
        ("LoRA r=16, checkpointing, 4 samples", {"loss_kernel": "fused", "loss_chunk": 1200}),
        ("full, checkpointing", {"loss_kernel": "fused"}),
        ("full, checkpointing", {"blocks": 9, "loss_chunk": 64}),
    ],
)
def test_switches_of_how_it_runs_are_near_what_pytorch_counts(name: str, switches: dict[str, Any]) -> None:
    adapter, work = next((adapter, work) for case, adapter, work in cases() if case == name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        predicted, counted = compared(adapter, replace(work, **switches))
    assert predicted == pytest.approx(counted, rel=0.1)


def test_fewer_recomputed_blocks_need_more_memory_and_less_work() -> None:
    """Monotone, so that the first number of blocks that fits is the best; and `auto` takes it."""
    from mgm_exp.compose import compose
    from mgm_exp.plan import fitted, plan_cell

    mgm = ["model=mgm_2b", "train=official", "adapter=lora_r16", "train.micro_batch_size=4", "device=cpu"]
    rtx = [*mgm, "plan.device=rtx4090", "plan.rows=1000", "plan.align_rows=1000"]
    cells = [plan_cell(compose([*rtx, f"model.gradient_checkpointing={n}"])) for n in (0, 6, 12, 18)]
    peaks = [cell.stages[-1].peak.total for cell in cells]
    flops = [cell.stages[-1].flops or 0.0 for cell in cells]
    assert peaks == sorted(peaks, reverse=True) and flops == sorted(flops)
    always = plan_cell(compose([*rtx, "model.gradient_checkpointing=true"]))
    assert always.stages[-1].peak.total <= peaks[-1] * 1.001 and always.stages[-1].flops == flops[-1]
    auto = plan_cell(compose([*rtx, "model.gradient_checkpointing=auto"]))
    assert auto.verdict == "fits"
    chosen = auto.stages[-1].work.blocks
    assert chosen is not None and 0 < chosen < 18
    one_less = plan_cell(compose([*rtx, f"model.gradient_checkpointing={chosen - 1}"]))
    assert one_less.verdict != "fits" or one_less.largest.name == "align"
    config = compose([*mgm, "model.gradient_checkpointing=3"])
    assert fitted(config, "instruct") is config


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mgm_7b", "mgm_8b", "mgm_13b"])
@pytest.mark.parametrize("name", ["LoRA r=16", "full, checkpointing", "full in pure bf16, checkpointing, 2 samples"])
def test_at_the_size_of_the_llama_models_it_is_near_what_pytorch_counts(model: str, name: str) -> None:
    adapter, work = next((adapter, work) for case, adapter, work in cases() if case == name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        predicted, counted = compared(adapter, work, model)
    assert predicted == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize(("adapter", "is_frozen"), [(lora(8), False), (FULL, True)], ids=["lora", "full"])
def test_on_the_tiny_model_it_is_what_pytorch_counts(adapter: AdapterConfig, is_frozen: bool) -> None:
    """Real tensors, the real loss, and AdamW: exact for what is held, near for what comes and goes."""
    sizes = architecture_of(ModelConfig("tiny"))
    model = load_model(TINY, dtype="float32")
    if adapter.kind is AdapterKind.lora:
        apply_adapter(model, adapter, 0)
    set_trainable(model, "instruct", adapter, is_frozen)
    model.train()
    parameters = parameters_of(sizes, "instruct", adapter, is_connector_frozen=is_frozen)
    batch, text = 8, 96
    work = Work(
        "instruct", batch, sizes.visual_tokens + text, text, 4, autocast=False, checkpointing=False,
        trains_connector=not is_frozen, trains_llm=adapter.kind is AdapterKind.full, targets=targets_of(adapter),
        rank=adapter.rank, is_cpu=True,
    )  # fmt: skip
    ids = torch.randint(7, 500, (batch, text + 1))
    ids[:, 0] = -200
    images = {"images": torch.randn(batch, 3, 64, 64), "images_aux": torch.randn(batch, 3, 128, 128)}
    labels = ids.masked_fill(ids == -200, -100)
    memory = LiveMemory()
    with memory:
        for parameter in model.parameters():
            memory.hold(parameter)
        weights = memory.mark()
        mask = torch.ones_like(ids).bool()
        model.loss({"input_ids": ids, "attention_mask": mask, "labels": labels, **images}).backward()
        counted = memory.mark()
    has = held(parameters, sizes, work)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert has.weights == weights
    # Every gradient is there but for those of biases without effect, which autograd makes, too.
    assert has.gradients == sum(p.grad.nbytes for p in trained if p.grad is not None)
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    states = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    assert has.optimizer == sum(value.nbytes for value in states)
    predicted = max(m.total - m.optimizer for m in moments(sizes, parameters, work) if m.name != "optimizer step")
    assert predicted == pytest.approx(counted, rel=0.1)


def base(**changes: Any) -> Work:
    work = Work("instruct", 1, 1024, 300, 2, autocast=True, checkpointing=True, trains_connector=True, trains_llm=True)
    return replace(work, **changes)


def test_full_fine_tuning_takes_16_bytes_a_parameter() -> None:
    sizes = architecture_of(MGM_2B)
    parameters = parameters_of(sizes, "instruct", FULL, is_connector_frozen=False)
    has = held(parameters, sizes, base())
    towers = 2 * (parameters.vision_tower + parameters.vision_tower_aux)
    assert has.weights + has.gradients + has.optimizer == 16 * parameters.trainable + towers
    assert 16 * parameters.trainable / 1e9 == pytest.approx(40.3, abs=0.05)


@pytest.mark.parametrize(("stage", "devices"), [(2, 1), (2, 8), (3, 1), (3, 8)])
def test_zero_shares_what_its_stage_shares(stage: int, devices: int) -> None:
    """Rajbhandari et al., section 5: 2 bytes of weights, 2 of gradients, 12 of state; stage 3 shares all of them."""
    sizes = architecture_of(MGM_2B)
    parameters = parameters_of(sizes, "instruct", FULL, is_connector_frozen=False)
    has = held(parameters, sizes, base(autocast=False, zero_stage=stage, devices=devices, reduce_bucket=1000))
    assert has.gradients == 2 * parameters.trainable / devices
    assert has.optimizer == 12 * parameters.trainable / devices
    assert has.weights == 2 * parameters.total / (devices if stage == 3 else 1)
    gathered = 2 * (sizes.vocabulary * sizes.hidden + 1000) if stage == 3 else 0
    assert has.buffers == 2 * 1000 + gathered
    offloaded = held(parameters, sizes, base(autocast=False, zero_stage=stage, devices=devices, offload=True))
    assert (offloaded.gradients, offloaded.optimizer) == (0, 0)


def test_what_saves_memory_is_predicted_to_save_it() -> None:
    sizes = architecture_of(MGM_2B)
    adapter = lora(16)

    def needs(**changes: Any) -> float:
        work = base(trains_llm=False, targets=tuple(SEVEN), rank=16, **changes)
        parameters = parameters_of(sizes, "instruct", adapter, is_connector_frozen=not work.trains_connector)
        return peak(moments(sizes, parameters, work)).total

    assert needs(checkpointing=False, length=2048) > needs(length=2048)
    assert needs(batch=8) > needs(batch=4) > needs(batch=1)
    assert needs(checkpointing=False, has_dropout=True) > needs(checkpointing=False)
    official = {"mines_natively": False}
    assert needs(trains_connector=False, encodes_images=False) < needs(trains_connector=False, **official)
    assert needs(trains_connector=False, **official) < needs(**official) and needs() < needs(**official)
    assert needs(checkpointing=False, is_eager=True, length=2048) > needs(checkpointing=False, length=2048)
    whole = layers(sizes, base(trains_llm=False, checkpointing=False, length=700)).saved
    assert whole > 50 * layers(sizes, base(trains_llm=False, length=700)).saved / 18
