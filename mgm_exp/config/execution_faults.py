"""Switches of speed and memory that do not go together, and what `auto` means among them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mgm_exp.config.choices import (
    AdapterKind,
    Attention,
    BlockKernel,
    Compile,
    CudaGraphs,
    Device,
    LastBlock,
    LoraKernel,
    LossKernel,
    ModelFamily,
    Precision,
)

if TYPE_CHECKING:
    from mgm_exp.config.experiment import ExperimentConfig

AUTO = "auto"
"""Of ``model.gradient_checkpointing``: as few blocks as fit."""


def execution_faults(config: ExperimentConfig) -> Iterator[str]:
    """Faults of how a model is to be run; what depends on the machine is found before the run begins."""
    yield from _loss_faults(config)
    if config.train.lora_kernel is LoraKernel.fused and (obstacle := _fused_lora_obstacle(config)):
        yield f"train.lora_kernel=fused does not go with {obstacle}; use auto or peft"
    if config.train.last_block is LastBlock.learnt and (obstacle := _learnt_block_obstacle(config, "instruct")):
        yield f"train.last_block=learnt does not go with {obstacle}; use auto or whole"
    if config.train.block_kernel is BlockKernel.fused and (obstacle := _fused_block_obstacle(config)):
        yield f"train.block_kernel=fused does not go with {obstacle}; use torch"
    train, model, kind = config.train, config.model, config.adapter.kind
    blocks = model.gradient_checkpointing
    if blocks != AUTO and not (isinstance(blocks, int) and blocks >= 0):
        yield (
            f"model.gradient_checkpointing={blocks!r}; allowed are true, false, auto, or a number of blocks of the "
            "LLM, 0 or above"
        )
    profile = train.profile
    if not (isinstance(profile, bool) or (isinstance(profile, int) and 1 <= profile <= 50)):
        yield f"train.profile={profile!r}; allowed are true, false, or a number of steps from 1 to 50"
    if train.padding_free:
        if model.family is ModelFamily.hf:
            yield "train.padding_free=true is for MGM; with model=hf the model's own processor pads: drop it"
        if model.attn_implementation is Attention.eager:
            yield (
                "train.padding_free=true needs an attention that knows where sequences begin: "
                "model.attn_implementation=auto, sdpa or flash_attention_2 (or _3), not eager"
            )
        if kind in (AdapterKind.prompt, AdapterKind.prefix):
            yield (
                f"train.padding_free=true puts all samples into one row, and adapter.kind={kind.value} its tokens in "
                "front of every row: set train.padding_free=false"
            )
    if train.compile is not Compile.none:
        if config.zero.stage == 3:
            yield "train.compile=regional does not go with zero=3, whose weights come and go within a block: use zero=2"
        if config.adapter.base_bits == 4 or kind not in (AdapterKind.full, AdapterKind.lora):
            what = "adapter.base_bits=4" if config.adapter.base_bits == 4 else f"adapter.kind={kind.value}"
            yield f"train.compile=regional was made for adapter.kind=full and lora; with {what} use train.compile=none"
    if train.cuda_graphs is CudaGraphs.packs and (obstacle := _graph_obstacle(config)):
        yield f"train.cuda_graphs=packs does not go with {obstacle}, or train.cuda_graphs=none"
    if train.offload_activations and config.device is Device.cpu:
        yield "train.offload_activations=true moves activations from a GPU to the host, where device=cpu has them"


def _loss_faults(config: ExperimentConfig) -> Iterator[str]:
    train = config.train
    early = train.loss_kernel in (LossKernel.fused, LossKernel.liger)
    if early and train.precision is Precision.fp16:
        yield (
            f"train.loss_kernel={train.loss_kernel.value} makes gradients before the fp16 loss scale could save the "
            "small ones; with train.precision=fp16 use train.loss_kernel=torch"
        )
    if train.loss_kernel is LossKernel.liger:
        if train.loss_chunk is not None:
            yield "train.loss_chunk is not read by train.loss_kernel=liger, which takes chunks of its own: drop it"
        if config.device is Device.cpu:
            yield "train.loss_kernel=liger is a GPU kernel and device=cpu was given; use fused or torch"
    is_other = train.loss_kernel is not LossKernel.torch or train.loss_chunk is not None
    if is_other and config.model.family is ModelFamily.hf and config.zero.stage == 3:
        yield (
            "train.loss_kernel and train.loss_chunk of a model of transformers (model=hf) read its head outside of the "
            "model, where zero=3 has not gathered it; use zero=2, or train.loss_kernel=torch without train.loss_chunk"
        )


def loss_kernel_of(config: ExperimentConfig, stage: str, has_liger: bool) -> str:
    """The loss kernel of a stage: ``torch``, ``fused`` or ``liger``; nothing depends on the machine but the last.

    Args:
        has_liger: Whether Liger can run: a GPU and the package.
    """
    asked, precision = config.train.loss_kernel, config.train.precision
    if asked is not LossKernel.auto:
        return asked.value
    if precision is Precision.fp16:
        return LossKernel.torch.value
    if has_liger:
        return LossKernel.liger.value
    # The gradient of a trained head would be held from the forward pass on: 4 bytes a word and a channel
    is_trained = stage == "instruct" and config.adapter.kind is AdapterKind.full
    return (LossKernel.torch if is_trained else LossKernel.fused).value


def lora_kernel_of(config: ExperimentConfig, stage: str) -> str | None:
    """How the LoRA layers of a stage are computed: ``peft`` or ``fused``; None: it has none."""
    if stage != "instruct" or config.adapter.kind is not AdapterKind.lora:
        return None
    asked = config.train.lora_kernel
    if asked is not LoraKernel.auto:
        return asked.value
    return (LoraKernel.peft if _fused_lora_obstacle(config) else LoraKernel.fused).value


def _fused_lora_obstacle(config: ExperimentConfig) -> str:
    """What keeps LoRA's products from being taken together, in words; empty if nothing does."""
    adapter, train = config.adapter, config.train
    obstacles = {
        f"adapter.kind={adapter.kind.value}, which has no LoRA layers": adapter.kind is not AdapterKind.lora,
        "adapter.use_dora=true, whose layers compute more": adapter.use_dora,
        "adapter.base_bits=4, whose layers have a product of their own": adapter.base_bits == 4,
        "zero=3, whose weights come and go with PEFT's modules": config.zero.stage == 3,
        f"train.compile={train.compile.value}, whose compiler fuses by itself": train.compile is not Compile.none,
    }
    return next((words for words, holds in obstacles.items() if holds), "")


def _fused_block_obstacle(config: ExperimentConfig) -> str:
    """What keeps the LLM's norms and gates from being one operation each, in words; empty if nothing does."""
    train = config.train
    obstacles = {
        "model=hf, whose blocks are not known": config.model.family is ModelFamily.hf,
        "device=cuda: it was made for the CPU": config.device is Device.cuda,
        f"train.precision={train.precision.value}, in which each of its steps would round": (
            train.precision is not Precision.fp32
        ),
        f"train.compile={train.compile.value}, whose compiler fuses by itself": train.compile is not Compile.none,
    }
    return next((words for words, holds in obstacles.items() if holds), "")


def last_block_of(config: ExperimentConfig, stage: str) -> str:
    """Where the LLM's last block is computed in a stage: ``whole`` or ``learnt``. Of align no adapter decides it."""
    asked = config.train.last_block
    if asked is not LastBlock.auto:
        return asked.value
    return (LastBlock.whole if _learnt_block_obstacle(config, stage) else LastBlock.learnt).value


def _learnt_block_obstacle(config: ExperimentConfig, stage: str) -> str:
    """What keeps the last block from being computed at learnt positions alone, in words; empty if nothing does."""
    adapter, train = config.adapter, config.train
    has_adapter = stage == "instruct"
    draws_all = adapter.dropout > 0 and lora_kernel_of(config, stage) == LoraKernel.peft.value
    obstacles = {
        "model=hf, whose blocks are not known": config.model.family is ModelFamily.hf,
        f"train.compile={train.compile.value}, which compiles all blocks as one": train.compile is not Compile.none,
        f"adapter.kind={adapter.kind.value}, only full and lora": (
            has_adapter and adapter.kind not in (AdapterKind.full, AdapterKind.lora)
        ),
        f"adapter.dropout={adapter.dropout:g} of PEFT's own layers, which would draw for fewer positions": (
            has_adapter and draws_all
        ),
    }
    return next((words for words, holds in obstacles.items() if holds), "")


def _graph_obstacle(config: ExperimentConfig) -> str:
    """What a CUDA graph of a pass cannot hold, and what to give in its place; empty if there is nothing."""
    adapter, model = config.adapter, config.model
    blocks, attention = model.gradient_checkpointing, model.attn_implementation
    obstacles = {
        "device=cpu: a graph is replayed by a GPU; use device=cuda": config.device is Device.cpu,
        f"adapter.kind={adapter.kind.value}: only LoRA trains in packs; use adapter=lora_r8, say": (
            adapter.kind is not AdapterKind.lora
        ),
        f"adapter.dropout={adapter.dropout:g}: a graph would draw for all trials from one generator; use "
        "adapter.dropout=0": adapter.dropout > 0,
        f"model.gradient_checkpointing={str(blocks).lower()}: small passes leave memory enough; use false": (
            blocks is not False and blocks != 0
        ),
        f"model.attn_implementation={attention.value}: use sdpa, which asks the device nothing": (
            attention not in (Attention.auto, Attention.sdpa)
        ),
    }
    return next((words for words, holds in obstacles.items() if holds), "")
