"""Where the parts of an LLM lie in a model: the names and sizes that adapters are declared by.

A model says so itself (`model.llm_layout`), from its configuration: nothing here is read off its tensors, and no
adapter knows a layer by a name of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mgm_exp.errors import ConfigError

if TYPE_CHECKING:
    from mgm_exp.model.configuration import MGMConfig

ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")
LLM_LINEARS = ATTENTION_LINEARS + MLP_LINEARS


@dataclass(frozen=True)
class LlmLayout:
    """Names and sizes of an LLM of equal blocks.

    Attributes:
        blocks: module that holds the blocks ("model.layers").
        n_blocks: how many.
        body: module whose forward takes `inputs_embeds` and a cache, and runs all blocks ("model").
        linears: short name -> place in a block ("q_proj" -> "self_attn.q_proj").
        shapes: short name -> (outputs, inputs).
        biased: short names of linears that have a bias.
        norms: places of the norms in a block; each has one weight of `hidden`.
        outside: names and shapes of the LLM's tensors outside its blocks; a tied head is not counted.
        final_norms: those of them that belong to a norm.
        hidden, kv_heads, head_dim: of the LLM.
    """

    blocks: str
    n_blocks: int
    body: str
    linears: Mapping[str, str]
    shapes: Mapping[str, tuple[int, int]]
    biased: tuple[str, ...]
    norms: tuple[str, ...]
    outside: Mapping[str, tuple[int, ...]]
    final_norms: tuple[str, ...]
    hidden: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: MGMConfig) -> LlmLayout:
        """The layout of MGM's LLMs, whose blocks have Gemma's and Llama's names."""
        hidden, inner, d = config.hidden_size, config.intermediate_size, config.head_dim
        mlp_bias = getattr(config, "mlp_bias", False)  # Llama's; Gemma has none
        query, key = config.num_attention_heads * d, config.num_key_value_heads * d
        outside: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (config.vocab_size, hidden),
            "model.norm.weight": (hidden,),
        }
        if not config.tie_word_embeddings:
            outside["lm_head.weight"] = (config.vocab_size, hidden)
        return cls(
            blocks="model.layers",
            n_blocks=config.num_hidden_layers,
            body="model",
            linears={
                **{name: f"self_attn.{name}" for name in ATTENTION_LINEARS},
                **{name: f"mlp.{name}" for name in MLP_LINEARS},
            },
            shapes={
                "q_proj": (query, hidden),
                "k_proj": (key, hidden),
                "v_proj": (key, hidden),
                "o_proj": (hidden, query),
                "gate_proj": (inner, hidden),
                "up_proj": (inner, hidden),
                "down_proj": (hidden, inner),
            },
            biased=(*(ATTENTION_LINEARS if config.attention_bias else ()), *(MLP_LINEARS if mlp_bias else ())),
            norms=("input_layernorm", "post_attention_layernorm"),
            outside=outside,
            final_norms=("model.norm.weight",),
            hidden=hidden,
            kv_heads=config.num_key_value_heads,
            head_dim=d,
        )

    def chosen(self, modules: Iterable[str]) -> tuple[str, ...]:
        """The short names, completed ("q" -> "q_proj") and checked.

        Raises:
            ConfigError: one that this LLM does not have, or none at all.
        """
        full = [name if name.endswith("_proj") else f"{name}_proj" for name in modules]
        unknown = [name for name in full if name not in self.linears]
        if unknown or not full:
            raise ConfigError(
                f"adapter.target_modules {unknown or full} cannot be used: allowed are {', '.join(self.linears)}."
            )
        return tuple(name for name in self.linears if name in full)

    def places(self, modules: Iterable[str]) -> dict[str, tuple[int, int]]:
        """Official module names of these linears in every block -> (outputs, inputs)."""
        chosen = self.chosen(modules)
        return {
            f"{self.blocks}.{i}.{self.linears[name]}": self.shapes[name]
            for i in range(self.n_blocks)
            for name in chosen
        }

    def targets(self, modules: Iterable[str]) -> str:
        """The full-match pattern of these linears. Never a list of suffixes: those hit a vision tower as well."""
        return rf"{re.escape(self.blocks)}\.\d+\.({_alternatives(self.linears[name] for name in self.chosen(modules))})"

    def names(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the LLM and its shape."""
        found: dict[str, tuple[int, ...]] = dict(self.outside)
        for i in range(self.n_blocks):
            block = f"{self.blocks}.{i}"
            found |= {f"{block}.{norm}.weight": (self.hidden,) for norm in self.norms}
            for name, place in self.linears.items():
                found[f"{block}.{place}.weight"] = self.shapes[name]
                if name in self.biased:
                    found[f"{block}.{place}.bias"] = self.shapes[name][:1]
        return found

    def pattern(self) -> str:
        """The full-match pattern of :meth:`names`."""
        inside = "|".join(re.escape(place) for place in (*self.linears.values(), *self.norms))
        outside = "|".join(re.escape(name) for name in self.outside)
        return rf"({outside}|{re.escape(self.blocks)}\.\d+\.({inside})\.(weight|bias))"

    def norm_names(self) -> dict[str, tuple[int, ...]]:
        """The weights of all norms, the final one included."""
        inside = {
            f"{self.blocks}.{i}.{norm}.weight": (self.hidden,) for i in range(self.n_blocks) for norm in self.norms
        }
        return inside | {name: self.outside[name] for name in self.final_norms}

    def bias_names(self) -> dict[str, tuple[int, ...]]:
        """The biases of the blocks' linears; Gemma and Llama have none."""
        return {
            f"{self.blocks}.{i}.{self.linears[name]}.bias": self.shapes[name][:1]
            for i in range(self.n_blocks)
            for name in self.biased
        }


def n_elements(shapes: Iterable[tuple[int, ...]]) -> int:
    """Parameters in tensors of these shapes."""
    return sum(math.prod(shape) for shape in shapes)


def _alternatives(places: Iterable[str]) -> str:
    """`self_attn.(q|k)_proj|mlp.(up)_proj` out of the places; others are taken as they stand."""
    groups: dict[str, list[str]] = {}
    plain: list[str] = []
    for place in places:
        home, _, name = place.rpartition(".")
        if home and name.endswith("_proj"):
            groups.setdefault(home, []).append(name.removesuffix("_proj"))
        else:
            plain.append(re.escape(place))
    grouped = [rf"{re.escape(home)}\.({'|'.join(map(re.escape, names))})_proj" for home, names in groups.items()]
    return "|".join([*grouped, *plain])
