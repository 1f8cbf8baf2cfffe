"""How a model is run while it trains: switches of speed and memory, none of which changes what is computed.

    execution = Execution(loss_kernel="fused", padding_free=True)
    run_as(model, execution)

Every one is a key of the configuration (`train.*`); docs/performance.md says how exact each is.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mgm_exp.errors import ModelError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Execution:
    """
    Attributes:
        loss_kernel: `torch`, `fused` or `liger`; see :mod:`mgm_exp.model.head`.
        loss_chunk: positions whose logits are alive together; None: by the size of the vocabulary.
        lora_kernel: `peft` or `fused`; see :mod:`mgm_exp.model.low_rank_product`.
        last_block: `whole` or `learnt`; see :mod:`mgm_exp.model.last_block`.
        block_kernel: `torch` or `fused`; see :mod:`mgm_exp.model.fused_block`.
        padding_free: a batch as one row without padding.
        compiles: the LLM's blocks by `torch.compile`, one for all.
        offloads: activations of the LLM wait for the backward pass in host memory.
    """

    loss_kernel: str = "torch"
    loss_chunk: int | None = None
    lora_kernel: str = "peft"
    last_block: str = "whole"
    block_kernel: str = "torch"
    padding_free: bool = False
    compiles: bool = False
    offloads: bool = False

    def in_words(self) -> str:
        """What is not as PyTorch and PEFT have it; empty where all is."""
        names = {name: value for name, value in vars(self).items() if value != getattr(Execution, name)}
        return ", ".join(f"{name}={str(value).lower()}" for name, value in names.items())

    def keeping_activations(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Around a forward pass: where what the backward pass needs is kept."""
        if not self.offloads:
            return nullcontext()
        from mgm_exp.model.offload import activations_on_host

        return activations_on_host([*model.parameters(), *model.buffers()])


def run_as(model: Any, execution: Execution) -> None:
    """Makes a model that is about to train run so.

    Raises:
        ModelError: this model cannot.
    """
    from mgm_exp.model.head import LanguageHead

    head = model.get_output_embeddings()
    if isinstance(head, LanguageHead):
        head.kernel, head.chunk = execution.loss_kernel, execution.loss_chunk
    if execution.lora_kernel == "fused":
        from mgm_exp.model.low_rank_product import InputDropout, fuse

        model.lora_dropout = InputDropout()
        fuse(model, model.lora_dropout)
    if execution.last_block == "learnt":
        from mgm_exp.model.last_block import LastBlock

        model.last_block = LastBlock(blocks_of(model)[-1], model.lora_dropout)
    if execution.block_kernel == "fused":
        from mgm_exp.model.fused_block import fuse_blocks

        fuse_blocks(blocks_of(model), model.model.norm)
    if execution.padding_free:
        _without_padding(model)
    if execution.compiles:
        compile_blocks(model)
    model.execution = execution


def blocks_of(model: Any) -> list[nn.Module]:
    """The equal blocks of a model's LLM, in their order.

    Raises:
        ModelError: they cannot be told from the rest.
    """
    if hasattr(model, "llm_layout"):
        return list(model.get_submodule(model.llm_layout.blocks))
    from transformers.modeling_layers import GradientCheckpointingLayer

    found = [module for module in model.get_decoder().modules() if isinstance(module, GradientCheckpointingLayer)]
    if not found:
        raise ModelError(
            f"{type(model).__name__}: the blocks of its language model cannot be told from the rest.",
            advice="Give model.gradient_checkpointing=true or false, and train.compile=none.",
        )
    return found


def checkpoint_first(model: Any, blocks: bool | int | str) -> None:
    """Of a model that recomputes all its blocks, lets the later ones keep their activations.

    The first blocks are recomputed last, when those of the later ones are gone: that is where recomputing saves most.

    Args:
        blocks: How many, from the first on; True or `auto`: all.
    """
    if isinstance(blocks, (bool, str)):
        return
    for block in blocks_of(model)[blocks:]:
        block.gradient_checkpointing = False  # type: ignore[assignment]


def has_liger(device: str) -> bool:
    """Whether Liger's kernels can run on `cpu` or `cuda`: a GPU, and the package."""
    return device == "cuda" and find_spec("liger_kernel") is not None


def compile_obstacle(device: str) -> str:
    """What keeps `torch.compile` from running on `cpu` or `cuda`, in words; empty if nothing does."""
    if device == "cuda":
        return "" if find_spec("triton") is not None else "torch's compiler needs the package triton on a GPU"
    return "" if any(map(shutil.which, ("g++", "clang++", "c++"))) else "torch's compiler needs a C++ compiler here"


def compile_blocks(model: Any) -> None:
    """Compiles the LLM's blocks where they stand, for training: names, parameters and checkpoints stay what they are.

    One compilation serves all blocks, which run the same code on the same shapes. Random numbers are drawn as without
    compilation, so dropout has the same masks. Evaluation runs uncompiled: its shapes change with every token.
    """
    import torch

    for block in blocks_of(model):
        plain: Callable[..., Any] = block._call_impl
        compiled = torch.compile(plain, options={"fallback_random": True})
        block._compiled_call_impl = _while_training(block, plain, compiled)  # type: ignore[assignment]


def _while_training(block: nn.Module, plain: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    def call(*args: Any, **kwargs: Any) -> Any:
        return (compiled if block.training and torch.is_grad_enabled() else plain)(*args, **kwargs)

    return call


def _without_padding(model: Any) -> None:
    """An attention that knows the borders of sequences in one row."""
    from mgm_exp.model.varlen import VARLEN, register

    config = model.config
    if config._attn_implementation == "sdpa":
        register()
        config._attn_implementation = VARLEN
