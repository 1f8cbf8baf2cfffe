"""BitFit (Ben Zaken et al., arXiv 2106.10199): the LLM's own small tensors are trained, and nothing is put in.

The paper trains biases. Gemma, Llama and Vicuna have none in their LLM, so BitFit as published would train nothing
there; what is left of its idea are the norms' weights, one number for each channel. `adapter.norms` says whether they
are trained beside the biases that there are. On a Gemma this is the tuning of norms alone, and is called so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mgm_exp.config import AdapterKind
from mgm_exp.errors import ConfigError, ModelError
from mgm_exp.model.adapters.base import ADVICE, Adapter, Cost, MergedWeights, Shapes, by_official_name, copy_exactly
from mgm_exp.model.layout import LlmLayout


class BitFit(Adapter):
    """Biases and norms of the LLM; saved as these tensors, merged by putting them in their places."""

    kind = AdapterKind.bitfit
    peft_type = "BITFIT"
    changes_base = True

    def tuned(self, llm: LlmLayout) -> Shapes:
        found: Shapes = dict(llm.bias_names())
        if self.section.norms:
            found |= llm.norm_names()
        if not found:
            raise ConfigError(
                "adapter.kind=bitfit with adapter.norms=false would train nothing: this LLM has no biases.",
                advice="Set adapter.norms=true to train its norms in their place, or choose another adapter.",
            )
        return found

    def patterns(self, llm: LlmLayout) -> list[str]:
        import re

        inside = [rf"{re.escape(place)}\.bias" for place in llm.linears.values() if llm.biased]
        norms = [rf"{re.escape(norm)}\.weight" for norm in llm.norms if self.section.norms]
        final = [re.escape(name) for name in llm.final_norms if self.section.norms]
        return ["|".join([rf"{re.escape(llm.blocks)}\.\d+\.({'|'.join(inside + norms)})", *final])]

    def cost(self, llm: LlmLayout) -> Cost:
        # The normalised input of every norm, for its weight's gradient
        return Cost(kept=2.0 * llm.hidden * len(llm.norms) if self.section.norms else 0.0)

    def put_in(self, model: nn.Module, llm: LlmLayout, seed: int) -> dict[str, Any]:
        return {"peft_type": self.peft_type, "tensors": sorted(self.tuned(llm))}

    @classmethod
    def open(
        cls, model: nn.Module, llm: LlmLayout, stated: dict[str, Any], tensors: Mapping[str, Tensor]
    ) -> frozenset[str]:
        allowed = {**llm.bias_names(), **llm.norm_names()}
        if foreign := sorted(set(tensors) - set(allowed)) or not tensors:
            raise ModelError(f"The BitFit adapter does not fit its base: {foreign}.", advice=ADVICE)
        parameters = by_official_name(model)
        return copy_exactly({name: parameters[name] for name in tensors}, tensors, "adapter")

    @classmethod
    def merged_weights(cls, stated: Mapping[str, Any], tensors: Mapping[str, Tensor], shapes: Shapes) -> MergedWeights:
        foreign = sorted(name for name in tensors if name not in shapes)
        if foreign or not tensors:
            raise ModelError(f"The BitFit adapter does not fit its base: {foreign[:1]}.", advice=ADVICE)
        return MergedWeights(replaced=dict(tensors))
