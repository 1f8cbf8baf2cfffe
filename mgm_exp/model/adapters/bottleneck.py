"""Bottleneck adapters (Houlsby et al., arXiv 1902.00751): h + U gelu(D h) behind attention and MLP of every block.

In front of the residual sum, that is behind `o_proj` and `down_proj`. U begins at zero, so that nothing changes at
first. PEFT has no such kind; the folder has the form of PEFT's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mgm_exp.config import AdapterKind
from mgm_exp.errors import ModelError
from mgm_exp.model.adapters.base import ADVICE, Adapter, Cost, Shapes, by_official_name, copy_exactly, start
from mgm_exp.model.layout import LlmLayout

_DOWN, _UP = "bottleneck_down", "bottleneck_up"


class Bottleneck(nn.Module):
    """A linear layer and a small network behind it: (..., inputs) -> (..., outputs)."""

    def __init__(self, base_layer: nn.Linear, width: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        weight = base_layer.weight
        self.bottleneck_down = nn.Linear(base_layer.out_features, width, device=weight.device)
        self.bottleneck_up = nn.Linear(width, base_layer.out_features, device=weight.device)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.base_layer(x)
        inner = F.gelu(self.bottleneck_down(h.to(self.bottleneck_down.weight.dtype)))
        return h + self.bottleneck_up(inner).to(h.dtype)


class BottleneckAdapter(Adapter):
    """Small networks behind sublayers."""

    kind = AdapterKind.bottleneck
    peft_type = "BOTTLENECK"
    why_not_merged = "it is a network with an activation of its own behind each sublayer, which no weight can hold"

    def added(self, llm: LlmLayout) -> Shapes:
        width, found = self.section.rank, Shapes()
        for place, (outputs, _) in llm.places(self.section.target_modules).items():
            found |= {f"{place}.{_DOWN}.weight": (width, outputs), f"{place}.{_DOWN}.bias": (width,)}
            found |= {f"{place}.{_UP}.weight": (outputs, width), f"{place}.{_UP}.bias": (outputs,)}
        return found

    def patterns(self, llm: LlmLayout) -> list[str]:
        return [llm.targets(self.section.target_modules) + r"\.bottleneck_(down|up)\.(weight|bias)"]

    def late(self, llm: LlmLayout) -> Iterable[str]:
        return [name for name in self.added(llm) if f".{_DOWN}." in name]  # while U is zero

    def cost(self, llm: LlmLayout) -> Cost:
        rows = [llm.shapes[name][0] for name in llm.chosen(self.section.target_modules)]
        return Cost(kept=float(sum(rows) + 2 * self.section.rank * len(rows)))

    def put_in(self, model: nn.Module, llm: LlmLayout, seed: int) -> dict[str, Any]:
        _wrap(model, llm, self.section.target_modules, self.section.rank)
        parameters = by_official_name(model)
        start({name: parameters[name] for name in self.added(llm)}, [_UP, ".bias"], seed)
        return {"peft_type": self.peft_type, "width": self.section.rank, "target_modules": self.section.target_modules}

    @classmethod
    def open(
        cls, model: nn.Module, llm: LlmLayout, stated: dict[str, Any], tensors: Mapping[str, Tensor]
    ) -> frozenset[str]:
        width, modules = stated.get("width"), stated.get("target_modules")
        if not isinstance(width, int) or width < 1 or not isinstance(modules, list):
            raise ModelError(f"adapter_config.json has no usable width and target_modules: {width!r}.", advice=ADVICE)
        _wrap(model, llm, [str(name) for name in modules], width)
        own = {n: p for n, p in by_official_name(model).items() if ".bottleneck_" in n}
        return copy_exactly(own, tensors, "adapter", widen=True)


def _wrap(model: nn.Module, llm: LlmLayout, modules: Iterable[str], width: int) -> None:
    for place in llm.places(modules):
        home, _, name = place.rpartition(".")
        linear = model.get_submodule(place)
        assert isinstance(linear, nn.Linear)
        setattr(model.get_submodule(home), name, Bottleneck(linear, width))
    model.train(model.training)
