"""LoHa (FedPara, Hyeon-Woo et al., arXiv 2108.06098): the elementwise product of two low-rank updates.

W + s (A1 B1) * (A2 B2), with s = alpha / r: of rank up to r^2, for the parameters of two LoRAs of rank r.
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
    Cost,
    MergedWeights,
    Shapes,
    by_official_name,
    check_parts,
    copy_exactly,
    inject,
    peft_config,
    split_by_module,
    start,
    stated_config,
)
from mgm_exp.model.layout import LlmLayout

_PARTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


class LoHa(Adapter):
    """Hadamard products of low-rank updates."""

    kind = AdapterKind.loha
    peft_type = "LOHA"

    def added(self, llm: LlmLayout) -> Shapes:
        rank, found = self.section.rank, Shapes()
        for place, (outputs, inputs) in llm.places(self.section.target_modules).items():
            for part in _PARTS:
                found[f"{place}.{part}"] = (outputs, rank) if part.endswith("a") else (rank, inputs)
        return found

    def patterns(self, llm: LlmLayout) -> list[str]:
        return [llm.targets(self.section.target_modules) + r"\.hada_w[12]_[ab]"]

    def late(self, llm: LlmLayout) -> Iterable[str]:
        return [name for name in self.added(llm) if not name.endswith("hada_w2_b")]  # which is zero at first

    def cost(self, llm: LlmLayout) -> Cost:
        shapes = [llm.shapes[name] for name in llm.chosen(self.section.target_modules)]
        # The product is made whole and kept by the linear layer that it is used in; its backward pass makes two more
        every = sum(rows * columns for rows, columns in shapes)
        return Cost(weights=2.0 * max(r * c for r, c in shapes), block_weights=float(every))

    def put_in(self, model: nn.Module, llm: LlmLayout, seed: int) -> dict[str, Any]:
        from peft import LoHaConfig

        section = self.section
        config = LoHaConfig(
            r=section.rank,
            alpha=section.alpha,  # type: ignore[arg-type]
            target_modules=llm.targets(section.target_modules),
            task_type="CAUSAL_LM",
        )
        inject(model, config)
        _never_drop_out(model)
        parameters = by_official_name(model)
        start({name: parameters[name] for name in self.added(llm)}, ["hada_w2_b"], seed)
        return stated_config(config)

    @classmethod
    def open(
        cls, model: nn.Module, llm: LlmLayout, stated: dict[str, Any], tensors: Mapping[str, Tensor]
    ) -> frozenset[str]:
        inject(model, peft_config(stated))
        own = {n: p for n, p in by_official_name(model).items() if n.endswith(_PARTS)}
        return copy_exactly(own, tensors, "adapter", widen=True)

    @classmethod
    def merged_weights(cls, stated: Mapping[str, Any], tensors: Mapping[str, Tensor], shapes: Shapes) -> MergedWeights:
        rank, alpha = stated.get("r"), stated.get("alpha")
        if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
            raise ModelError(f"adapter_config.json has no usable r and alpha: {rank!r}, {alpha!r}.", advice=ADVICE)
        modules = split_by_module(tensors, "hada_")
        check_parts("LoHa", modules, _PARTS, shapes)
        return MergedWeights(
            {f"{module}.weight": parts for module, parts in modules.items()}, scale=float(alpha) / rank
        )

    @classmethod
    def merged(cls, weight: Tensor, parts: Mapping[str, Tensor], merge: MergedWeights) -> Tensor:
        first, second = (parts[f"hada_w{i}_a"].float() @ parts[f"hada_w{i}_b"].float() for i in (1, 2))
        return weight + first * second * torch.tensor(merge.scale)


def _never_drop_out(model: nn.Module) -> None:
    """PEFT leaves a layer out where a random number is not above its share, 0: one time in 2^24, on one process."""
    for module in model.modules():
        if isinstance(shares := getattr(module, "module_dropout", None), dict):
            shares.update(dict.fromkeys(shares, -1.0))
