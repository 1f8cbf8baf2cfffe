"""No adapter: every tensor of the LLM is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mgm_exp.config import AdapterKind
from mgm_exp.errors import ModelError
from mgm_exp.model.adapters.base import Adapter, Shapes
from mgm_exp.model.layout import LlmLayout


class Full(Adapter):
    """The whole LLM; saved as a complete model folder."""

    kind = AdapterKind.full

    def tuned(self, llm: LlmLayout) -> Shapes:
        return llm.names()

    def patterns(self, llm: LlmLayout) -> list[str]:
        return [llm.pattern()]

    def put_in(self, model: nn.Module, llm: LlmLayout, seed: int) -> dict[str, Any]:
        return {}

    @classmethod
    def open(
        cls, model: nn.Module, llm: LlmLayout, stated: dict[str, Any], tensors: Mapping[str, Tensor]
    ) -> frozenset[str]:
        raise ModelError("A full fine-tuning is a model folder of its own, not an adapter.")
