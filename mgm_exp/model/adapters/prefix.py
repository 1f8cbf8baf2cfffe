"""Prefix tuning (Li & Liang, arXiv 2101.00190): learnt keys and values in front of every layer's own.

They are handed to the LLM's body as a cache that already holds n positions, in training as in generation. Without the
paper's reparametrisation. Recomputed layers would drop the cache: not with gradient checkpointing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mgm_exp.config import AdapterKind
from mgm_exp.errors import ModelError
from mgm_exp.model.adapters.base import Adapter, Cost, Shapes, by_official_name, copy_exactly, start
from mgm_exp.model.adapters.prompt import PEFT_NAME, body_of, is_first, one_tensor, widen_mask
from mgm_exp.model.layout import LlmLayout

NAME = "learnt_prefix"


class LearntPrefix(nn.Module):
    """(n, layers * 2 * heads * head_dim): keys and values of every layer, in PEFT's order."""

    def __init__(self, n: int, llm: LlmLayout, device: torch.device) -> None:
        super().__init__()
        self.sides = (llm.n_blocks * 2, llm.kv_heads, llm.head_dim)
        self.weight = nn.Parameter(torch.zeros(n, _width(llm), device=device))

    def forward(self, batch: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (batch, heads, n, head_dim) of each layer."""
        layers, heads, width = self.sides
        whole = self.weight.to(dtype).view(-1, layers, heads, width).permute(1, 2, 0, 3)  # (2 L, heads, n, d)
        whole = whole[:, None].expand(-1, batch, -1, -1, -1)
        return [(whole[2 * i], whole[2 * i + 1]) for i in range(layers // 2)]


class Prefix(Adapter):
    """Learnt keys and values in front of every layer's own."""

    kind = AdapterKind.prefix
    peft_type = "PREFIX_TUNING"
    why_not_merged = "its learnt keys and values belong to the input, and no weight of the model can hold them"

    def added(self, llm: LlmLayout) -> Shapes:
        return {f"{llm.body}.{NAME}.weight": (self.section.tokens, _width(llm))}

    def patterns(self, llm: LlmLayout) -> list[str]:
        return [rf"{re.escape(llm.body)}\.{NAME}\.weight"]

    def cost(self, llm: LlmLayout) -> Cost:
        return Cost(tokens=self.section.tokens)

    def put_in(self, model: nn.Module, llm: LlmLayout, seed: int) -> dict[str, Any]:
        _attach(model, llm, self.section.tokens)
        name = f"{llm.body}.{NAME}.weight"
        start({name: by_official_name(model)[name]}, [], seed)
        return {
            "peft_type": self.peft_type,
            "task_type": "CAUSAL_LM",
            "num_virtual_tokens": self.section.tokens,
            "token_dim": llm.kv_heads * llm.head_dim,
            "num_layers": llm.n_blocks,
            "num_attention_heads": llm.kv_heads,
            "num_transformer_submodules": 1,
            "encoder_hidden_size": llm.hidden,
            "prefix_projection": False,
        }

    def to_files(self, stated: dict[str, Any], state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        [tensor] = state.values()
        return stated, {PEFT_NAME: tensor}

    @classmethod
    def open(
        cls, model: nn.Module, llm: LlmLayout, stated: dict[str, Any], tensors: Mapping[str, Tensor]
    ) -> frozenset[str]:
        if stated.get("prefix_projection"):
            raise ModelError(
                "A prefix with a projection cannot be opened.", advice="Save it without prefix_projection."
            )
        values = one_tensor(tensors)
        _attach(model, llm, values.shape[0])
        name = f"{llm.body}.{NAME}.weight"
        return copy_exactly({name: by_official_name(model)[name]}, {name: values}, "adapter", widen=True)


def _width(llm: LlmLayout) -> int:
    return llm.n_blocks * 2 * llm.kv_heads * llm.head_dim


def _attach(model: nn.Module, llm: LlmLayout, n: int) -> LearntPrefix:
    body = body_of(model, llm, NAME)
    prefix = LearntPrefix(n, llm, next(body.parameters()).device)
    body.add_module(NAME, prefix)

    def before(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        from transformers import DynamicCache

        if is_first(kwargs):
            given = kwargs.get("inputs_embeds")
            given = kwargs["input_ids"] if given is None else given
            dtype = given.dtype if given.is_floating_point() else next(model.get_input_embeddings().parameters()).dtype  # type: ignore[operator]
            if (cache := kwargs.get("past_key_values")) is None:
                cache = DynamicCache(config=module.config)  # type: ignore[arg-type]
            for layer, (keys, values) in enumerate(prefix(len(given), dtype)):
                cache.update(keys, values, layer)
            kwargs["past_key_values"] = cache
        widen_mask(kwargs, n)
        if (positions := kwargs.get("position_ids")) is not None:
            kwargs["position_ids"] = positions + n
        return args, kwargs

    body.register_forward_pre_hook(before, with_kwargs=True)
    return prefix
