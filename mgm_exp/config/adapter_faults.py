"""What of an adapter's settings does not go together, with the model, the engine or the machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING

from mgm_exp.config.as_json import plain
from mgm_exp.config.choices import AdapterInit, AdapterKind, Device, FeatureTier, ModelFamily
from mgm_exp.config.model import BOTTLENECK_PLACES, LINEAR_LAYERS, READS, AdapterConfig
from mgm_exp.config.train import trains_towers

if TYPE_CHECKING:
    from mgm_exp.config.experiment import ExperimentConfig

# Kinds whose forward pass reads weights outside the module that holds them, which ZeRO-3 has not gathered then.
_NOT_MERGED = (AdapterKind.prompt, AdapterKind.prefix, AdapterKind.bottleneck)
_NOT_WITH_ZERO_3 = (AdapterKind.loha, AdapterKind.vera, AdapterKind.prompt, AdapterKind.prefix)


def adapter_faults(config: ExperimentConfig) -> Iterator[str]:
    """Every fault, in words: what was given, what is allowed, what to do."""
    adapter = config.adapter
    yield from _unread(adapter)
    yield from _ranges(adapter, knows_layers=config.model.family is ModelFamily.mgm)
    if adapter.kind is AdapterKind.lora:
        yield from _lora(adapter)
    if adapter.kind is AdapterKind.adalora:
        yield from _adalora(adapter)
    yield from _surroundings(config)


def _unread(adapter: AdapterConfig) -> Iterator[str]:
    default = AdapterConfig("", adapter.kind)
    reads = READS[adapter.kind]
    given = [
        f.name
        for f in fields(adapter)
        if f.name not in ("name", "kind", *reads) and plain(getattr(adapter, f.name)) != plain(getattr(default, f.name))
    ]
    if not given:
        return
    if adapter.kind is AdapterKind.full:
        yield (
            f"adapter=full trains every weight of the LLM and takes no {', '.join(given)} "
            "(no rank, alpha, dropout or target_modules); use adapter=lora_r8 or lora_r16 with them"
        )
    else:
        takes = ", ".join(f"adapter.{key}" for key in reads)
        yield (
            f"adapter.kind={adapter.kind.value} does not read {', '.join(f'adapter.{key}' for key in given)}: it takes "
            f"{takes}; drop {'it' if len(given) == 1 else 'them'}, or choose another kind"
        )


def _ranges(adapter: AdapterConfig, *, knows_layers: bool) -> Iterator[str]:
    reads = READS[adapter.kind]
    what = {AdapterKind.lora: "a LoRA adapter", AdapterKind.bottleneck: "a bottleneck (its width)"}
    if "rank" in reads and adapter.rank < 1:
        yield f"adapter.rank={adapter.rank} must be 1 or above for {what.get(adapter.kind, adapter.kind.value)}"
    if "alpha" in reads and not 0 < adapter.alpha < float("inf"):
        yield f"adapter.alpha={adapter.alpha} must be a finite number above 0 (the update is scaled by alpha / rank)"
    if "tokens" in reads and adapter.tokens < 1:
        yield f"adapter.tokens={adapter.tokens} must be 1 or above: it is the number of learnt tokens"
    if "target_modules" in reads:
        allowed = BOTTLENECK_PLACES if adapter.kind is AdapterKind.bottleneck else LINEAR_LAYERS
        wrong = [name for name in adapter.target_modules if knows_layers and name not in allowed]
        if wrong or not adapter.target_modules:
            yield f"adapter.target_modules={adapter.target_modules}; allowed are {list(allowed)}, at least one"


def _lora(adapter: AdapterConfig) -> Iterator[str]:
    is_pissa = adapter.init is AdapterInit.pissa
    if not 0 < adapter.b_lr_ratio < float("inf"):
        yield f"adapter.b_lr_ratio={adapter.b_lr_ratio} must be a finite number above 0 (1: plain LoRA, 16: LoRA+)"
    if adapter.pissa_iterations < 0:
        yield f"adapter.pissa_iterations={adapter.pissa_iterations} must be 0 (exact) or above"
    if adapter.pissa_iterations and not is_pissa:
        yield "adapter.pissa_iterations is read with adapter.init=pissa only; give both or neither"
    if is_pissa and adapter.use_dora:
        yield "adapter.init=pissa changes the weights that adapter.use_dora=true takes the lengths of; use one of them"
    if adapter.base_bits not in (4, 16):
        yield f"adapter.base_bits={adapter.base_bits}; allowed are 16 (the weights as they are) and 4 (QLoRA)"
    elif adapter.base_bits == 4 and (is_pissa or adapter.use_dora):
        key = "adapter.init=pissa" if is_pissa else "adapter.use_dora=true"
        yield f"{key} needs the weights themselves, which adapter.base_bits=4 has rounded; use one of them"


def _adalora(adapter: AdapterConfig) -> Iterator[str]:
    section = adapter.adalora
    if section.initial_rank <= adapter.rank:
        yield (
            f"adapter.adalora.initial_rank={section.initial_rank} must be above adapter.rank={adapter.rank}: AdaLoRA "
            "begins with more rank than it keeps"
        )
    for key in ("warmup_share", "final_share"):
        if not 0 <= getattr(section, key) < 1:
            yield f"adapter.adalora.{key}={getattr(section, key)} must lie in [0, 1)"
    if section.warmup_share + section.final_share >= 1:
        yield "adapter.adalora.warmup_share and final_share leave no step between them: their sum must be below 1"
    if section.every_steps < 1:
        yield f"adapter.adalora.every_steps={section.every_steps} must be 1 or above"
    if not 0 <= section.orthogonality < float("inf"):
        yield f"adapter.adalora.orthogonality={section.orthogonality} must be a finite number, 0 or above"


def _surroundings(config: ExperimentConfig) -> Iterator[str]:
    """Engine, machine and model that a kind needs."""
    adapter, zero = config.adapter, config.zero.stage
    kind = adapter.kind
    if kind is AdapterKind.adalora and zero:
        yield (
            f"adapter.kind=adalora reads the gradients of its factors after every step, which zero={zero} has shared "
            "out by then; use zero=none"
        )
    elif zero == 3 and (kind in _NOT_WITH_ZERO_3 or adapter.use_dora):
        what = "adapter.use_dora=true" if adapter.use_dora else f"adapter.kind={kind.value}"
        yield f"{what} reads weights that zero=3 has not gathered at that moment; use zero=2 or zero=none"
    if config.eval.merge_adapter and kind in _NOT_MERGED:
        yield (
            f"eval.merge_adapter=true adds what an adapter learnt to the weights, and no weight can hold "
            f"adapter.kind={kind.value}: set it to false"
        )
    if adapter.base_bits == 4:
        if zero:
            yield f"adapter.base_bits=4 does not go with zero={zero}: 4-bit weights cannot be shared out; use zero=none"
        if config.device is Device.cpu:
            yield "adapter.base_bits=4 (QLoRA) trains on a GPU only, by bitsandbytes; device=cpu was given"
    blocks = config.model.gradient_checkpointing
    if kind is AdapterKind.prefix and blocks:
        yield (
            "adapter.kind=prefix puts keys and values in front of each layer's own, which "
            f"model.gradient_checkpointing={str(blocks).lower()} drops when it computes a layer again; set it to false "
            "(it costs memory)"
        )
    if kind is AdapterKind.bitfit and not adapter.norms and _has_no_biases(config.model.name):
        yield (
            f"adapter.kind=bitfit with adapter.norms=false would train nothing: the LLM of model={config.model.name} "
            "has no biases; set adapter.norms=true to train its norms in their place"
        )
    if trains_towers(config.train) and config.train.cache_visual_tokens:
        yield (
            "train.cache_visual_tokens=true reads what the towers saw once, and train.optimize_vision_tower(_aux)=true "
            "changes the towers; set it to false"
        )
    tier = config.train.feature_cache
    if trains_towers(config.train) and tier not in (FeatureTier.none, FeatureTier.auto):
        yield (
            f"train.feature_cache={tier.value} keeps what frozen towers see, and "
            "train.optimize_vision_tower(_aux)=true changes the towers; set it to none, or to auto: then the align "
            "stage, which trains no tower, uses it alone"
        )


def _has_no_biases(name: str) -> bool:
    """Gemma, Llama and Vicuna, the LLMs of MGM."""
    return name == "tiny" or name.startswith("mgm_")
