"""Which trials may train in a pack, and which of them together. From configurations alone, without torch."""

from __future__ import annotations

from mgm_exp.config import (
    AUTO,
    AdapterInit,
    AdapterKind,
    Compile,
    ExperimentConfig,
    ModelFamily,
    last_block_of,
    plain,
    trains_towers,
)
from mgm_exp.store import fingerprint


def why_alone(config: ExperimentConfig) -> str | None:
    """Why a run trains by itself, in words; None: it may train in a pack."""
    adapter, train = config.adapter, config.train
    reasons = {
        "model=hf": config.model.family is not ModelFamily.mgm,
        f"adapter.kind={adapter.kind.value}, only LoRA is packed": adapter.kind is not AdapterKind.lora,
        "adapter.use_dora=true": adapter.use_dora,
        "adapter.init=pissa changes the base": adapter.init is AdapterInit.pissa,
        "adapter.base_bits=4": adapter.base_bits == 4,
        "it trains vision towers": trains_towers(train),
        f"devices={config.devices}": config.devices > 1,
        f"zero={config.zero.stage}": bool(config.zero.stage),
        "train.auto_micro_batch=true": train.auto_micro_batch,
        "train.padding_free=true": train.padding_free,
        "train.compile=regional": train.compile is not Compile.none,
        "train.offload_activations=true": train.offload_activations,
        "model.gradient_checkpointing=auto counts on the card alone": config.model.gradient_checkpointing == AUTO,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def likeness(config: ExperimentConfig) -> str:
    """Equal for runs that may train together: the same base and kernels, layers with an adapter, and sizes of a pass.

    Data may differ, and all that concerns one trial only: rank, scale, dropout, rates, warm-up, weight decay, seed,
    length of training.
    """
    train = config.train
    return fingerprint(
        {
            "model": plain(config.model),
            "device": config.device.value,
            "target_modules": sorted(config.adapter.target_modules),
            "precision": train.precision.value,
            "micro_batch_size": train.micro_batch_size,
            "max_length": train.max_length,
            "last_block": last_block_of(config, "instruct"),
            "block_kernel": train.block_kernel.value,
            "deterministic": train.deterministic,
            "tf32": train.tf32,
            "cuda_graphs": train.cuda_graphs.value,
        }
    )
