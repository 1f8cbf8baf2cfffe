"""What a run trains of a model of transformers: LoRA on layers of its language model, or the language model itself."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import nn

from mgm_exp.errors import ConfigError, ModelError
from mgm_exp.model.hf.parts import Parts, parts_of
from mgm_exp.model.loading import seeded_uniform
from mgm_exp.model.tensors import official_name
from mgm_exp.model.trainable import TrainableSet, assert_trainable


def put_adapter_on(model: nn.Module, adapter: Any, seed: int) -> Parts:
    """Puts LoRA into the model in place (nothing for `kind=full`), and gives the parts that it had before.

    B starts at zero and A at U(-1/sqrt(in), 1/sqrt(in)), drawn from the seed and the tensor's name; both are fp32.

    Raises:
        ConfigError: a target that the language model has not.
        ModelError: the adapter lies on other layers than declared.
    """
    from peft import LoraConfig, inject_adapter_in_model

    parts = parts_of(model)
    if adapter.kind.value == "full":
        return parts
    declared = {f"{layer}.lora_{side}.weight" for layer in parts.targets(adapter.target_modules) for side in "AB"}
    config = LoraConfig(
        r=int(adapter.rank),
        lora_alpha=adapter.alpha,
        lora_dropout=float(adapter.dropout),
        target_modules=parts.pattern(adapter.target_modules),
        bias="none",
        task_type="CAUSAL_LM",
    )
    inject_adapter_in_model(config, model)
    found = adapter_parameters(model)
    if set(found) != declared:
        raise ModelError(f"LoRA was put on other layers than declared: {sorted(declared ^ set(found))[:3]}.")
    with torch.no_grad():
        for name, parameter in found.items():
            parameter.data = parameter.data.float()
            if ".lora_A." in name:
                parameter.copy_(seeded_uniform(tuple(parameter.shape), 1 / math.sqrt(parameter.shape[1]), seed, name))
            else:
                parameter.zero_()
    return parts


def set_trainable(model: nn.Module, parts: Parts, adapter: Any, train_connector: bool) -> TrainableSet:
    """Sets `requires_grad` of every parameter and asserts that exactly the declared set is trainable.

    Args:
        parts: Of the model, as :func:`put_adapter_on` gave them.
        adapter: `mgm_exp.config.AdapterConfig`.
        train_connector: Trains what lies between vision tower and language model too.

    Raises:
        ConfigError: no connector is known.
        ModelError: the set is not the declared one.
    """
    lora, llm, connector = frozenset[str](), frozenset[str](), frozenset[str]()
    patterns: list[str] = []
    if adapter.kind.value == "full":
        llm = parts.llm
        patterns.append(rf"{re.escape(parts.text)}.*")
        patterns += sorted(re.escape(name) for name in parts.head)
    else:
        lora = frozenset(f"{n}.lora_{side}.weight" for n in parts.targets(adapter.target_modules) for side in "AB")
        patterns.append(parts.pattern(adapter.target_modules) + r"\.lora_[AB]\.weight")
    if train_connector:
        connector = parts.connector
        if not connector:
            raise ConfigError(
                f"model.train_connector=true, but no connector is known in {type(model).__name__}.",
                advice="Give model.train_connector=false.",
            )
        patterns += [rf"{re.escape(name)}.*" for name in parts.connectors]
    declared = lora | llm | connector
    parameters = {official_name(name): parameter for name, parameter in model.named_parameters()}
    if stray := sorted(n for n in declared if n not in parameters or not any(re.fullmatch(p, n) for p in patterns)):
        raise ModelError(f"{stray[0]!r} is declared trainable, but is not in the model or matches none of {patterns}.")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in declared)
    trainable = TrainableSet(
        lora=lora,
        connector=connector,
        llm=llm,
        patterns=tuple(patterns),
        n_lora=sum(parameters[name].numel() for name in lora),
        n_other=sum(parameters[name].numel() for name in llm | connector),
        late=frozenset(name for name in lora if name.endswith(".lora_A.weight")),
    )
    assert_trainable(model, trainable)
    return trainable


def training_mode(model: nn.Module) -> None:
    """Training mode for what is trained; modules without a trained tensor stay as in evaluation (no dropout)."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and module is not model and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """LoRA's tensors by name, without the adapter's own name in it."""
    return {official_name(n): p for n, p in model.named_parameters() if ".lora_A." in n or ".lora_B." in n}
