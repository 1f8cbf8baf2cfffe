"""Which kernels a run will take, and whether they can run on this machine: found before anything is computed."""

from __future__ import annotations

from importlib.util import find_spec

from mgm_exp.config import Attention, BlockKernel, Compile, CudaGraphs, ExperimentConfig, LossKernel, Precision
from mgm_exp.errors import ConfigError, MissingDependencyError
from mgm_exp.model.execution import compile_obstacle, has_liger
from mgm_exp.train.pack.compatible import why_alone

_DTYPE = {Precision.fp32: "float32", Precision.bf16: "bfloat16", Precision.fp16: "float16"}
_PACKAGES = {
    Attention.flash_attention_2: ("flash_attn", "flash-attn"),
    Attention.flash_attention_3: ("flash_attn_interface", "flash-attn-3"),
}


def check_kernels(config: ExperimentConfig, device: str) -> None:
    """
    Args:
        device: ``cpu`` or ``cuda``: what the run will use.

    Raises:
        MissingDependencyError: a kernel was asked for that cannot run here.
        ConfigError: a switch that this device has no use for.
    """
    check_attention(config)
    train = config.train
    if train.loss_kernel is LossKernel.liger and not has_liger(device):
        missing = "the package liger-kernel is not installed" if device == "cuda" else "this run uses the CPU"
        raise MissingDependencyError(
            f"train.loss_kernel=liger is a GPU kernel, and {missing}.",
            advice="pip install 'mgm-exp[cuda]' on a machine with CUDA, or use train.loss_kernel=fused (or auto).",
        )
    if train.block_kernel is BlockKernel.fused and device != "cpu":
        raise ConfigError(
            "train.block_kernel=fused was made for the CPU, and this run uses a GPU: use train.block_kernel=torch, or "
            "train.compile=regional."
        )
    if train.compile is not Compile.none and (obstacle := compile_obstacle(device)):
        raise MissingDependencyError(
            f"train.compile={train.compile.value} cannot run: {obstacle}.",
            advice="Install it, or use train.compile=none.",
        )
    if train.cuda_graphs is CudaGraphs.packs:
        _check_graphs(config, device)
    if train.offload_activations and device == "cpu":
        raise ConfigError(
            "train.offload_activations=true moves activations from a GPU to the host, and this run uses the CPU, where "
            "they are there already: drop it."
        )


def _check_graphs(config: ExperimentConfig, device: str) -> None:
    if device != "cuda":
        raise MissingDependencyError(
            "train.cuda_graphs=packs is replayed by a GPU, and this run uses the CPU.",
            advice="Use train.cuda_graphs=none.",
        )
    if not config.launch.pack:
        raise ConfigError(
            "train.cuda_graphs=packs replays passes of trials that train together, and this run trains alone.",
            advice="Start a sweep with hydra/launcher=packed, or use train.cuda_graphs=none.",
        )
    if (why := why_alone(config)) is not None:
        raise ConfigError(
            f"train.cuda_graphs=packs replays passes of trials that train together, and this one trains alone: {why}.",
            advice="Change that, or use train.cuda_graphs=none.",
        )
    if (attention := attention_of(config, device)) != Attention.sdpa.value:
        raise ConfigError(
            f"train.cuda_graphs=packs: model.attn_implementation={config.model.attn_implementation.value} "
            f"is {attention} here, which reads lengths on the host: a graph cannot.",
            advice="Use model.attn_implementation=sdpa, or train.cuda_graphs=none.",
        )


def check_attention(config: ExperimentConfig) -> None:
    """Raises MissingDependencyError where the package of the attention that was asked for is not there."""
    asked = config.model.attn_implementation
    module, package = _PACKAGES.get(asked, ("", ""))
    if module and find_spec(module) is None:
        raise MissingDependencyError(
            f"model.attn_implementation={asked.value} needs the package {package}, which is not installed.",
            advice="pip install 'mgm-exp[cuda]' on a machine with CUDA (FlashAttention 2), or use sdpa (or auto).",
        )


def attention_of(config: ExperimentConfig, device: str) -> str:
    """The attention that will run, with ``auto`` resolved."""
    asked = config.model.attn_implementation
    if asked is not Attention.auto:
        return asked.value
    if device != "cuda" or config.train.precision is Precision.fp32:
        return Attention.sdpa.value
    import torch

    from mgm_exp.model.attention import choose_attention

    return choose_attention("auto", torch.device("cuda"), getattr(torch, _DTYPE[config.train.precision])).name
