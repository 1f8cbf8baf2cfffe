"""Switches of speed and memory in a stage that is really trained, and what goes with what."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mgm_exp.config import (
    Attention,
    BlockKernel,
    Compile,
    CudaGraphs,
    Device,
    ExperimentConfig,
    LoraKernel,
    LossKernel,
    ModelFamily,
    Precision,
    plain,
    validate,
)
from mgm_exp.errors import ConfigError, MissingDependencyError
from mgm_exp.kernels import attention_of, check_kernels
from mgm_exp.model.attention import choose_attention
from mgm_exp.train import run_stage
from mgm_exp.train.deepspeed_engine import deepspeed_config
from mgm_exp.train.job import TrainJob, stage_settings
from mgm_exp.train.metrics_file import read_rows
from mgm_exp.train.ranks import Ranks
from mgm_exp.train.tf32 import tf32

from .conftest import experiment, full, lora

MakeJob = Callable[..., TrainJob]


def switched(config: ExperimentConfig, **switches: Any) -> ExperimentConfig:
    """`adapter` is the section; `blocks`, `activation` go to the model, `zero_*` to ZeRO, all else to the section."""
    model, zero = config.model, config.zero
    config = replace(config, adapter=switches.pop("adapter", config.adapter))
    if "activation" in switches:
        model = replace(model, hidden_activation=switches.pop("activation"))
    if "blocks" in switches:
        model = replace(model, gradient_checkpointing=switches.pop("blocks"))
    for key in [key for key in switches if key.startswith("zero_")]:
        zero = replace(zero, **{key.removeprefix("zero_"): switches.pop(key)})
    return replace(config, model=model, zero=zero, train=replace(config.train, **switches))


def losses(job: TrainJob) -> list[float]:
    return [row["loss"] for row in read_rows(job.metrics) if "event" not in row]


SWITCHES = {"loss_kernel": LossKernel.fused, "loss_chunk": 3, "padding_free": True, "blocks": 1}


def test_a_stage_with_every_switch_learns_what_the_plain_one_does(make_job: MakeJob) -> None:
    settings: dict[str, Any] = {"adapter": lora(), "steps": 3, "micro_batch": 4, "lr": 1e-3}
    tanh = switched(experiment(**settings), activation="gelu_pytorch_tanh")
    plain_job, other = make_job(name="plain", **settings), make_job(name="other", **settings)
    plain_job = replace(plain_job, config=plain(tanh))
    other = replace(other, config=plain(switched(tanh, **SWITCHES, block_kernel=BlockKernel.fused)))
    said: list[str] = []
    run_stage(plain_job)
    run_stage(other, say=said.append)
    assert losses(other) == pytest.approx(losses(plain_job), abs=5e-6)
    assert losses(other) != losses(plain_job)  # they did run in another way
    switches = "loss_kernel=fused, loss_chunk=3, lora_kernel=fused, last_block=learnt, "
    switches += "block_kernel=fused, padding_free=true"
    assert f"instruct: {switches}" in said
    report = json.loads((other.out / "summary.json").read_text())["load_report"]
    assert report["execution"] == switches
    ours, theirs = (load_file(job.out / "adapter" / "adapter_model.safetensors") for job in (other, plain_job))
    assert ours.keys() == theirs.keys()


def test_recomputing_a_block_more_may_continue_a_stage_to_the_same_bits(make_job: MakeJob) -> None:
    settings: dict[str, Any] = {"adapter": lora(0.1), "steps": 3, "every_steps": 1}
    whole = make_job(name="whole", **settings)
    run_stage(whole)
    parted = make_job(name="parted", **settings)
    run_stage(parted)
    (parted.out / "summary.json").unlink()
    for folder in sorted(parted.checkpoints.iterdir())[2:]:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    summary = run_stage(replace(parted, config=plain(switched(experiment(**settings), blocks=2))))
    assert summary.resumed_from == [2]
    assert losses(parted) == losses(whole)
    name = Path("adapter") / "adapter_model.safetensors"
    assert (parted.out / name).read_bytes() == (whole.out / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_sharded_training_runs_the_same_switches(make_job: MakeJob, zero: int) -> None:
    settings: dict[str, Any] = {"adapter": full(), "steps": 2, "micro_batch": 2, "zero": zero, "devices": 2}
    plain_job, other = make_job(name="plain", **settings), make_job(name="other", **settings)
    more = {"zero_prefetch_bucket_size": 100_000, "zero_persistence_threshold": 0} if zero == 3 else {}
    other = replace(other, config=plain(switched(experiment(**settings), **SWITCHES, **more)))
    run_stage(plain_job)
    run_stage(other)
    assert losses(other) == pytest.approx(losses(plain_job), rel=1e-5)
    saved = (other.out / "model" / "config.json").read_text()
    assert "mgm_varlen" not in saved


# -- what goes with what -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("switches", "says"),
    [
        ({"blocks": "some"}, "a number of blocks"),
        ({"blocks": 1.5}, "a number of blocks"),
        ({"blocks": -1}, "0 or above"),
        ({"loss_chunk": 0}, "train.loss_chunk=0"),
        ({"loss_kernel": LossKernel.fused, "precision": Precision.fp16}, "before the fp16 loss scale"),
        ({"loss_kernel": LossKernel.liger}, "device=cpu was given"),
        ({"loss_kernel": LossKernel.liger, "loss_chunk": 8}, "chunks of its own"),
        ({"compile": Compile.regional, "zero_stage": 3}, "come and go within a block"),
        ({"offload_activations": True}, "where device=cpu has them"),
        ({"lora_kernel": LoraKernel.fused, "adapter": full()}, "adapter.kind=full, which has no LoRA layers"),
        ({"lora_kernel": LoraKernel.fused, "adapter": lora(), "zero_stage": 3}, "zero=3, whose weights come and go"),
        ({"lora_kernel": LoraKernel.fused, "adapter": lora(), "compile": Compile.regional}, "train.compile=regional"),
        ({"block_kernel": BlockKernel.fused, "precision": Precision.bf16}, "train.precision=bf16, in which each"),
        ({"block_kernel": BlockKernel.fused, "compile": Compile.regional}, "train.compile=regional, whose compiler"),
        ({"cuda_graphs": CudaGraphs.packs}, "device=cpu: a graph is replayed by a GPU; use device=cuda"),
        ({"zero_persistence_threshold": -1}, "zero.persistence_threshold=-1"),
    ],
)
def test_switches_that_do_not_go_together_are_refused_with_their_reason(switches: dict[str, Any], says: str) -> None:
    config = switched(experiment(), **switches)
    if config.train.precision is Precision.fp16:
        config = replace(config, device=Device.cuda)
    with pytest.raises(ConfigError, match=says):
        validate(config)


def test_models_of_transformers_and_learnt_prompts_keep_their_padding() -> None:
    config = switched(experiment(), padding_free=True)
    other = replace(config, model=replace(config.model, family=ModelFamily.hf))
    with pytest.raises(ConfigError, match="own processor pads"):
        validate(other)
    other = switched(other, padding_free=False, block_kernel=BlockKernel.fused)
    with pytest.raises(ConfigError, match="model=hf, whose blocks are not known"):
        validate(other)
    on_gpu = replace(switched(experiment(), block_kernel=BlockKernel.fused), device=Device.cuda)
    with pytest.raises(ConfigError, match="device=cuda: it was made for the CPU"):
        validate(on_gpu)


def test_a_kernel_that_is_not_there_is_named_before_anything_is_computed() -> None:
    config = replace(experiment(), device=Device.auto)
    with pytest.raises(MissingDependencyError, match="liger is a GPU kernel, and this run uses the CPU"):
        check_kernels(switched(config, loss_kernel=LossKernel.liger), "cpu")
    with pytest.raises(ConfigError, match="they are there already"):
        check_kernels(switched(config, offload_activations=True), "cpu")
    with pytest.raises(ConfigError, match=r"fused was made for the CPU, and this run uses a GPU"):
        check_kernels(switched(config, block_kernel=BlockKernel.fused), "cuda")
    with pytest.raises(MissingDependencyError, match="flash_attention_3 cannot run here: it needs a CUDA device"):
        choose_attention("flash_attention_3", torch.device("cpu"), torch.bfloat16)
    check_kernels(switched(config, loss_kernel=LossKernel.auto), "cpu")
    assert attention_of(config, "cpu") == "sdpa"


def packed(**switches: Any) -> ExperimentConfig:
    config = switched(experiment(adapter=switches.pop("adapter", lora())), cuda_graphs=CudaGraphs.packs, **switches)
    return replace(config, device=Device.auto, launch=replace(config.launch, pack=True))


@pytest.mark.parametrize(
    ("switches", "says"),
    [
        ({"adapter": lora(0.1)}, "adapter.dropout=0.1: a graph would draw.* use adapter.dropout=0, or train.cuda_gr"),
        ({"adapter": full()}, "adapter.kind=full: only LoRA trains in packs"),
        ({"blocks": 2}, "gradient_checkpointing=2: small passes leave memory enough; use false"),
    ],
)
def test_what_a_graph_cannot_hold_is_refused(switches: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        validate(packed(**switches))


def test_graphs_are_for_packs_on_a_gpu() -> None:
    validate(packed())
    check_kernels(packed(), "cuda")
    with pytest.raises(MissingDependencyError, match=r"by a GPU, and this run uses the CPU.*train.cuda_graphs=none"):
        check_kernels(packed(), "cpu")
    with pytest.raises(ConfigError, match=r"this run trains alone. Start a sweep with hydra/launcher=packed"):
        check_kernels(replace(packed(), launch=replace(packed().launch, pack=False)), "cuda")
    with pytest.raises(ConfigError, match=r"this one trains alone: train\.auto_micro_batch=true"):
        check_kernels(packed(auto_micro_batch=True), "cuda")
    eager = replace(packed(), model=replace(packed().model, attn_implementation=Attention.eager))
    with pytest.raises(ConfigError, match="attn_implementation=eager: use sdpa"):
        validate(eager)
    with pytest.raises(ConfigError, match="eager is eager here, which reads lengths"):
        check_kernels(eager, "cuda")


def test_tf32_is_one_policy_for_products_and_convolutions_and_ends_with_the_stage() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    for is_allowed in (True, False):
        with tf32(is_allowed):
            assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is is_allowed
            torch.get_float32_matmul_precision()  # torch's compiler asks for it
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


def test_deepspeed_is_told_how_to_send_parameters() -> None:
    config = switched(experiment(zero=3), zero_prefetch_bucket_size=7, zero_persistence_threshold=8)
    section = deepspeed_config(stage_settings(config, "instruct"), config.zero, Ranks.alone(Device.cpu))[
        "zero_optimization"
    ]
    assert section["stage3_prefetch_bucket_size"] == 7 and section["stage3_param_persistence_threshold"] == 8
    usual = experiment(zero=3)
    section = deepspeed_config(stage_settings(usual, "instruct"), usual.zero, Ranks.alone(Device.cpu))[
        "zero_optimization"
    ]
    assert section["stage3_prefetch_bucket_size"] == usual.zero.reduce_bucket_size
