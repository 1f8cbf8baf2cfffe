"""LoRA (Hu et al., arXiv 2106.09685) and what it can be combined with.

W + s B A, with s = alpha / r, or alpha / sqrt(r) in rsLoRA (arXiv 2312.03732). LoRA+ (arXiv 2402.12354) gives B a
multiple of A's learning rate. DoRA (arXiv 2402.09353) learns the length of each output's weights on its own:
m (W + s B A) / ||W + s B A||, row by row. PiSSA and the 4-bit base have files of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mgm_exp.config import AdapterInit, AdapterKind
from mgm_exp.errors import ModelError
from mgm_exp.model.adapters.base import (
    ADVICE,
    PEFT_PREFIX,
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
from mgm_exp.model.adapters.pissa import as_plain_lora, start_from_principal_part
from mgm_exp.model.layout import LlmLayout

DOWN, UP, LENGTH = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector.weight"
# What would need more than the formulas above: empty in every adapter that is made here.
_UNSUPPORTED = ("fan_in_fan_out", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save")


class Lora(Adapter):
    """Low-rank updates of linear layers."""

    kind = AdapterKind.lora
    peft_type = "LORA"

    def added(self, llm: LlmLayout) -> Shapes:
        rank, found = self.section.rank, Shapes()
        for place, (outputs, inputs) in llm.places(self.section.target_modules).items():
            found[f"{place}.{DOWN}"], found[f"{place}.{UP}"] = (rank, inputs), (outputs, rank)
            if self.section.use_dora:
                found[f"{place}.{LENGTH}"] = (outputs,)
        return found

    def patterns(self, llm: LlmLayout) -> list[str]:
        parts = r"lora_([AB]|magnitude_vector)" if self.section.use_dora else "lora_[AB]"
        return [llm.targets(self.section.target_modules) + rf"\.{parts}\.weight"]

    def late(self, llm: LlmLayout) -> Iterable[str]:
        # A has no gradient while B is zero; PiSSA begins with both
        return () if self._is_pissa else [name for name in self.added(llm) if name.endswith(DOWN)]

    def rates(self, llm: LlmLayout) -> dict[str, float]:
        ratio = self.section.b_lr_ratio
        return {name: ratio for name in self.added(llm) if ratio != 1 and name.endswith(UP)}

    def cost(self, llm: LlmLayout) -> Cost:
        if not self.section.use_dora:
            return Cost()
        shapes = [llm.shapes[name] for name in llm.chosen(self.section.target_modules)]
        # The base layer's output and LoRA's are kept for the lengths' gradient; PEFT makes B A out of a unit matrix of
        # the layer's inputs, and W + s B A whole
        whole = max(columns**2 + 3 * rows * columns for rows, columns in shapes)
        return Cost(kept=2.0 * sum(rows for rows, _ in shapes), weights=float(whole))

    @property
    def _is_pissa(self) -> bool:
        return self.section.init is AdapterInit.pissa

    def put_in(self, model: nn.Module, llm: LlmLayout, seed: int) -> dict[str, Any]:
        from peft import LoraConfig

        section = self.section
        if section.base_bits == 4:
            from mgm_exp.model.adapters.quantized import quantize

            quantize(model, llm)
        config = LoraConfig(
            r=section.rank,
            lora_alpha=section.alpha,  # type: ignore[arg-type]
            lora_dropout=section.dropout,
            target_modules=llm.targets(section.target_modules),
            bias="none",
            task_type="CAUSAL_LM",
            use_rslora=section.use_rslora,
            use_dora=section.use_dora,
        )
        inject(model, config)
        parameters = by_official_name(model)
        start({n: parameters[n] for n in self.added(llm) if n in parameters and not n.endswith(LENGTH)}, [UP], seed)
        places = llm.places(section.target_modules)
        if section.use_dora:
            with torch.no_grad():
                for place in places:
                    # In fp32, as the forward pass has it: a length rounded to bf16 would not be the weight's own
                    length = parameters[f"{place}.{LENGTH}"]
                    length.data = _lengths(parameters[f"{place}.weight"].float())
        if self._is_pissa:
            self._start = start_from_principal_part(
                parameters, places, section.rank, self._scale, section.pissa_iterations, seed
            )
        return stated_config(config)

    @property
    def _scale(self) -> float:
        return _scaled(self.section.alpha, self.section.rank, self.section.use_rslora)

    def to_files(self, stated: dict[str, Any], state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        tensors = dict(state)
        if self._is_pissa:
            stated, tensors = as_plain_lora(stated, tensors, self._start)
        # PEFT's files call DoRA's lengths by their old name
        renamed = {name.replace(LENGTH, LENGTH.removesuffix(".weight")): t for name, t in tensors.items()}
        return stated, {PEFT_PREFIX + name: tensor for name, tensor in renamed.items()}

    @classmethod
    def from_files(cls, stated: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        old = LENGTH.removesuffix(".weight")
        return {f"{n}.weight" if n.endswith(old) else n: t for n, t in tensors.items()}

    @classmethod
    def open(
        cls, model: nn.Module, llm: LlmLayout, stated: dict[str, Any], tensors: Mapping[str, Tensor]
    ) -> frozenset[str]:
        inject(model, peft_config(stated))
        return copy_exactly(
            {n: p for n, p in by_official_name(model).items() if ".lora_" in n}, tensors, "adapter", widen=True
        )

    @classmethod
    def merged_weights(cls, stated: Mapping[str, Any], tensors: Mapping[str, Tensor], shapes: Shapes) -> MergedWeights:
        scale = _stated_scale(stated)
        modules = split_by_module(tensors, "lora_")
        check_parts("LoRA", modules, [DOWN, UP, *([LENGTH] if stated.get("use_dora") else [])], shapes)
        for module, parts in modules.items():
            down, up = parts[DOWN], parts[UP]
            if down.shape[0] != stated["r"] or (up.shape[0], down.shape[1]) != shapes[f"{module}.weight"]:
                raise ModelError(
                    f"{module} has factors {list(up.shape)} and {list(down.shape)}, its weight is "
                    f"{list(shapes[f'{module}.weight'])} and the rank {stated['r']}.",
                    advice="It was made for another base model.",
                )
        return MergedWeights({f"{module}.weight": parts for module, parts in modules.items()}, scale=scale)

    @classmethod
    def is_idle(cls, parts: Mapping[str, Tensor]) -> bool:
        return LENGTH not in parts and super().is_idle(parts)

    @classmethod
    def merged(cls, weight: Tensor, parts: Mapping[str, Tensor], merge: MergedWeights) -> Tensor:
        total = weight.addmm(parts[UP].float(), parts[DOWN].float(), alpha=merge.scale)
        if LENGTH not in parts:
            return total
        return total * (parts[LENGTH].float() / _lengths(total))[:, None]


def _lengths(weight: Tensor) -> Tensor:
    """(outputs,): the L2 norm of each row."""
    return torch.linalg.norm(weight, dim=1)


def _scaled(alpha: float, rank: int, use_rslora: bool) -> float:
    return float(alpha) / (math.sqrt(rank) if use_rslora else rank)


def _stated_scale(stated: Mapping[str, Any]) -> float:
    used = [key for key in _UNSUPPORTED if stated.get(key)]
    if stated.get("init_lora_weights", True) not in (True, False, "gaussian"):
        used.append(f"init_lora_weights={stated['init_lora_weights']}")  # these change the base as well
    if stated.get("bias", "none") != "none":
        used.append("bias")
    if used:
        raise ModelError(
            f"adapter_config.json uses {', '.join(used)}, which cannot be merged here.", advice="Merge it with PEFT."
        )
    rank, alpha = stated.get("r"), stated.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise ModelError(f"adapter_config.json has no usable r and lora_alpha: {rank!r}, {alpha!r}.", advice=ADVICE)
    return _scaled(alpha, rank, bool(stated.get("use_rslora")))
