"""VeRA (Kopiczko et al., arXiv 2310.11454): one pair of frozen random matrices for all layers, scales for each.

W + diag(b) B diag(d) A, with B and A cut to each layer's size; b and d are learnt. The matrices are drawn from the
seed, and saved with the adapter: another version of a library may draw others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mgm_exp.config import AdapterKind
from mgm_exp.errors import ModelError
from mgm_exp.model.adapters.base import (
    ADVICE,
    Adapter,
    MergedWeights,
    Shapes,
    by_official_name,
    check_parts,
    copy_exactly,
    peft_config,
    split_by_module,
    start,
    stated_config,
)
from mgm_exp.model.layout import LlmLayout

_PARTS = ("vera_lambda_b", "vera_lambda_d")
_SHARED = ("vera_A", "vera_B")
_SHARED_HOME = "base_model."
# Of d, as in the paper; b begins at zero.
_FIRST = 0.1


class Vera(Adapter):
    """Learnt scales of shared random matrices."""

    kind = AdapterKind.vera
    peft_type = "VERA"

    def added(self, llm: LlmLayout) -> Shapes:
        found = Shapes()
        for place, (outputs, _) in llm.places(self.section.target_modules).items():
            found[f"{place}.vera_lambda_b"], found[f"{place}.vera_lambda_d"] = (outputs,), (self.section.rank,)
        return found

    def patterns(self, llm: LlmLayout) -> list[str]:
        return [llm.targets(self.section.target_modules) + r"\.vera_lambda_[bd]"]

    def late(self, llm: LlmLayout) -> Iterable[str]:
        return [name for name in self.added(llm) if name.endswith("vera_lambda_d")]  # while b is zero

    def put_in(self, model: nn.Module, llm: LlmLayout, seed: int) -> dict[str, Any]:
        from peft import VeraConfig

        section = self.section
        config = VeraConfig(
            r=section.rank,
            vera_dropout=section.dropout,
            target_modules=llm.targets(section.target_modules),
            projection_prng_key=seed,
            save_projection=True,
            d_initial=_FIRST,
            task_type="CAUSAL_LM",
        )
        _inject(model, config)
        self._shared = _shared(model)
        parameters = by_official_name(model)
        own = {name: parameters[name] for name in self.added(llm)}
        start(own, _PARTS, seed)
        with torch.no_grad():
            for name, parameter in own.items():
                if name.endswith("vera_lambda_d"):
                    parameter.fill_(_FIRST)
        return stated_config(config)

    def to_files(self, stated: dict[str, Any], state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        stated, tensors = super().to_files(stated, state)
        return stated, tensors | {f"{_SHARED_HOME}{name}": tensor for name, tensor in self._shared.items()}

    @classmethod
    def from_files(cls, stated: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name.removeprefix(_SHARED_HOME): tensor for name, tensor in tensors.items()}

    @classmethod
    def open(
        cls, model: nn.Module, llm: LlmLayout, stated: dict[str, Any], tensors: Mapping[str, Tensor]
    ) -> frozenset[str]:
        _inject(model, peft_config(stated))
        own = {n: p for n, p in by_official_name(model).items() if n.endswith(_PARTS)}
        names = copy_exactly(own, {n: t for n, t in tensors.items() if n not in _SHARED}, "adapter", widen=True)
        for name, there in _shared(model).items():
            if name not in tensors or tensors[name].shape != there.shape:
                raise ModelError(f"The VeRA adapter lacks {name} of shape {list(there.shape)}.", advice=ADVICE)
            there.copy_(tensors[name])
        return names

    @classmethod
    def merged_weights(cls, stated: Mapping[str, Any], tensors: Mapping[str, Tensor], shapes: Shapes) -> MergedWeights:
        if missing := [name for name in _SHARED if name not in tensors]:
            raise ModelError(f"The VeRA adapter lacks {missing[0]}.", advice="Save it with save_projection=True.")
        modules = split_by_module({n: t for n, t in tensors.items() if n not in _SHARED}, "vera_")
        check_parts("VeRA", modules, _PARTS, shapes)
        shared = {name: tensors[name] for name in _SHARED}
        return MergedWeights({f"{module}.weight": {**parts, **shared} for module, parts in modules.items()}, scale=1.0)

    @classmethod
    def merged(cls, weight: Tensor, parts: Mapping[str, Tensor], merge: MergedWeights) -> Tensor:
        outputs, inputs = weight.shape
        up = parts["vera_B"][:outputs].float() * parts["vera_lambda_b"].float()[:, None]
        down = parts["vera_A"][:, :inputs].float() * parts["vera_lambda_d"].float()[:, None]
        return weight + up @ down


def _inject(model: nn.Module, config: Any) -> None:
    """As `inject`, by the class itself: `inject_adapter_in_model` refuses kinds with shared matrices."""
    from peft import VeraModel

    try:
        VeraModel(model, config, "default")
    except ValueError as error:
        raise ModelError(f"The adapter cannot be put into this model: {error}", advice=ADVICE) from error
    model.train(model.training)


def _shared(model: nn.Module) -> dict[str, Tensor]:
    """The shared matrices of a model with VeRA: the same two tensors in every layer, in fp32."""
    layers = [module for module in model.modules() if hasattr(module, "vera_lambda_b")]
    if not layers:
        raise ModelError("The model has no VeRA layers.")
    found = {}
    for name in _SHARED:
        matrix = getattr(layers[0], name)["default"].float()
        for layer in layers:
            getattr(layer, name)["default"] = matrix
        found[name] = matrix
    return found
