"""What a kind of adapter is: what it trains, how it is put in, what a file of it looks like, how it is merged.

One file beside this one for each kind. The tensors are declared from the configuration, with their shapes, before
anything is built: counts, plans and the trainable-set contract all come from that declaration.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mgm_exp.config import AdapterConfig, AdapterKind
from mgm_exp.errors import ModelError
from mgm_exp.model.layout import LlmLayout, n_elements
from mgm_exp.model.loading import seeded_uniform
from mgm_exp.model.resident import own
from mgm_exp.model.tensors import official_name

Shapes = dict[str, tuple[int, ...]]
PEFT_PREFIX = "base_model.model."
ADVICE = "It was made for another base model, or is damaged."


@dataclass(frozen=True)
class Cost:
    """What a kind needs beside its parameters, for plans.

    Args:
        kept: Elements for each token and block that are kept for the backward pass (beside inputs of target layers).
        weights: Elements of the largest temporary of a weight's size.
        block_weights: Elements of weights that each block keeps for its backward pass.
        tokens: That are put in front of every sequence.
        state: Bytes for each adapter parameter beside weight, gradient and optimizer.
    """

    kept: float = 0.0
    weights: float = 0.0
    block_weights: float = 0.0
    tokens: int = 0
    state: float = 0.0


@dataclass(frozen=True)
class MergedWeights:
    """An adapter as changes of its base's weights.

    Args:
        changed: Official weight name -> tensors that its kind's `merged` reads.
        replaced: Official names -> tensors that take the place of the base's.
        scale: Of the update, where there is one.
    """

    changed: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)
    scale: float = 0.0


class Adapter(ABC):
    """One kind of adapter, as a configuration asks for it.

    Args:
        section: The configuration's `adapter`.
    """

    kind: ClassVar[AdapterKind]
    # As `adapter_config.json` has it: PEFT's where PEFT knows the kind.
    peft_type: ClassVar[str] = ""
    # Whether putting a saved one in writes into tensors of the base, which others may use too.
    changes_base: ClassVar[bool] = False
    # Why it cannot become weights of the base; empty: it can.
    why_not_merged: ClassVar[str] = ""

    def __init__(self, section: AdapterConfig) -> None:
        self.section = section

    # -- what it trains -----------------------------------------------------------------------------------------

    def added(self, llm: LlmLayout) -> Shapes:
        """Official names and shapes of the tensors that it puts into the model."""
        return {}

    def tuned(self, llm: LlmLayout) -> Shapes:
        """Names and shapes of the base's own tensors that it trains."""
        return {}

    @abstractmethod
    def patterns(self, llm: LlmLayout) -> list[str]:
        """Anchored patterns of all these names, for the record."""

    def late(self, llm: LlmLayout) -> Iterable[str]:
        """Names of tensors that have no gradient in the first update, because a factor is still zero."""
        return ()

    def uncertain(self, llm: LlmLayout) -> Iterable[str]:
        """Names of tensors that are trained and need not move."""
        return ()

    def rates(self, llm: LlmLayout) -> dict[str, float]:
        """Name -> multiple of the learning rate, where it is not 1."""
        return {}

    def n_parameters(self, llm: LlmLayout) -> int:
        return n_elements(self.added(llm).values()) + n_elements(self.tuned(llm).values())

    def cost(self, llm: LlmLayout) -> Cost:
        return Cost()

    # -- in the model -------------------------------------------------------------------------------------------

    @abstractmethod
    def put_in(self, model: nn.Module, llm: LlmLayout, seed: int) -> dict[str, Any]:
        """Puts it into the model, with its first values; returns its `adapter_config.json`."""

    # -- on disk ------------------------------------------------------------------------------------------------

    def to_files(self, stated: dict[str, Any], state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """`adapter_config.json` and the tensors as the files have them, from tensors by official name."""
        return stated, {PEFT_PREFIX + name: tensor for name, tensor in state.items()}

    @classmethod
    def from_files(cls, stated: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by official name, of what a file holds, its prefixes removed."""
        return dict(tensors)

    @classmethod
    @abstractmethod
    def open(
        cls, model: nn.Module, llm: LlmLayout, stated: dict[str, Any], tensors: Mapping[str, Tensor]
    ) -> frozenset[str]:
        """Puts a saved adapter into its base: the modules, then the tensors (by official name); returns their names."""

    # -- merged -------------------------------------------------------------------------------------------------

    @classmethod
    def merged_weights(cls, stated: Mapping[str, Any], tensors: Mapping[str, Tensor], shapes: Shapes) -> MergedWeights:
        """Which weights change, checked against the base's shapes.

        Raises:
            ModelError: it does not fit, or cannot be merged.
        """
        raise ModelError(f"A {cls.kind.value} adapter cannot be merged: {cls.why_not_merged}.")

    @classmethod
    def is_idle(cls, parts: Mapping[str, Tensor]) -> bool:
        """Whether a weight's update is zero because one of its factors is."""
        return any(not bool(part.any()) for part in parts.values())

    @classmethod
    def merged(cls, weight: Tensor, parts: Mapping[str, Tensor], merge: MergedWeights) -> Tensor:
        """A weight (fp32) with the adapter in it; asked of kinds whose `merged_weights` names changed weights."""
        raise ModelError(f"A {cls.kind.value} adapter cannot be added to a weight.")


def inject(model: nn.Module, config: Any) -> None:
    """Puts PEFT's layers into the model in place; new layers keep the model's mode.

    Raises:
        ModelError: PEFT found nothing to put them on.
    """
    from peft import inject_adapter_in_model

    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:
        raise ModelError(f"The adapter cannot be put into this model: {error}", advice=ADVICE) from error
    model.train(model.training)


def peft_config(stated: Mapping[str, Any]) -> Any:
    """The PEFT configuration of an `adapter_config.json`, for an adapter that is not trained on.

    Raises:
        ModelError: it is none.
    """
    from peft import PeftConfig

    try:
        config = PeftConfig.from_peft_type(**stated)
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"adapter_config.json is not a PEFT config: {error}", advice=ADVICE) from error
    config.inference_mode = True
    return config


def by_official_name(model: nn.Module) -> dict[str, nn.Parameter]:
    return {official_name(name): parameter for name, parameter in model.named_parameters()}


def copy_exactly(
    parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], what: str, widen: bool = False
) -> frozenset[str]:
    """Copies tensors into parameters of exactly the same names and shapes; returns the names.

    Args:
        widen: Gives the parameters the tensors' dtype first.

    Raises:
        ModelError: names or shapes differ.
    """
    missing, foreign = sorted(set(parameters) - set(tensors)), sorted(set(tensors) - set(parameters))
    if missing or foreign:
        raise ModelError(
            f"The {what} does not fit this model: {len(missing)} tensors missing (first {missing[:1]}), "
            f"{len(foreign)} that it has no place for (first {foreign[:1]}).",
            advice="It was made for another base model.",
        )
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise ModelError(
                f"The {what} does not fit this model: {name} is {list(tensors[name].shape)}, "
                f"expected {list(parameter.shape)}.",
                advice="It was made for another base model.",
            )
    own(parameters.values())
    with torch.no_grad():
        for name, parameter in parameters.items():
            if widen:
                parameter.data = parameter.data.to(tensors[name].dtype)
            parameter.copy_(tensors[name])
    return frozenset(parameters)


def start(parameters: Mapping[str, nn.Parameter], zeros: Iterable[str], seed: int) -> None:
    """First values in fp32: zero where a name holds one of `zeros`, else U(-1/sqrt(in), 1/sqrt(in)).

    That is PyTorch's own start of a linear layer, drawn from the seed and the tensor's name: the same on any device
    and for any set of layers.
    """
    still = tuple(zeros)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.data = parameter.data.float()
            if any(part in name for part in still):
                parameter.zero_()
            else:
                bound = parameter.shape[-1] ** -0.5
                parameter.copy_(seeded_uniform(tuple(parameter.shape), bound, seed, name))


def stated_config(config: Any) -> dict[str, Any]:
    """A PEFT configuration as it is written to `adapter_config.json`."""
    values = dict(config.to_dict())
    return {key: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for key, v in values.items()}


def split_by_module(tensors: Mapping[str, Tensor], mark: str) -> dict[str, dict[str, Tensor]]:
    """`model.layers.0.mlp.up_proj.lora_A.weight` -> {`model.layers.0.mlp.up_proj`: {`lora_A.weight`: ...}}."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, sep, part = name.partition(f".{mark}")
        found.setdefault(module, {})[f"{mark}{part}" if sep else ""] = tensor
    return found


def check_parts(what: str, modules: Mapping[str, Mapping[str, Tensor]], wanted: Iterable[str], shapes: Shapes) -> None:
    """Every module belongs to the base and has exactly the wanted parts.

    Raises:
        ModelError: naming the first that does not.
    """
    expected = set(wanted)
    foreign = sorted(module for module in modules if f"{module}.weight" not in shapes)
    uneven = sorted(module for module, parts in modules.items() if set(parts) != expected)
    if not modules or foreign or uneven:
        first = (foreign or uneven or ["no tensors"])[0]
        raise ModelError(f"The {what} adapter does not fit its base: {first}.", advice=ADVICE)
