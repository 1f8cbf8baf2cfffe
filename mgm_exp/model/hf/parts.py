"""Which tensors of a model belong to its language model, its connector and the rest; found in the model, by name.

Vision towers use the same layer names (`q_proj`), so nothing is told by the end of a name alone: the language model is
the module that `get_decoder()` gives, and only what lies below it is meant.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from mgm_exp.errors import ConfigError, ModelError
from mgm_exp.model.tensors import official_name

_CONNECTORS = (
    "multi_modal_projector",
    "connector",
    "merger",
    "mm_projector",
    "aligner",
    "embed_vision",
    "modality_projection",
)


@dataclass(frozen=True)
class Parts:
    """Names of a model's parts.

    Args:
        text: Of the module that is the language model, with a dot at its end.
        connectors: Of the modules between vision tower and language model, each with a dot; empty: none is known.
        linears: Of all linear layers of the language model.
        parameters: Name -> number of elements of every tensor; tied ones once.
        head: Names of the tensors of the output layer that are not tied to the embeddings.
    """

    text: str
    connectors: tuple[str, ...]
    linears: tuple[str, ...]
    parameters: dict[str, int]
    head: frozenset[str]

    @property
    def llm(self) -> frozenset[str]:
        """The language model's tensors, its head included."""
        return frozenset(name for name in self.parameters if name.startswith(self.text)) | self.head

    @property
    def connector(self) -> frozenset[str]:
        return (
            frozenset(name for name in self.parameters if name.startswith(self.connectors))
            if self.connectors
            else frozenset()
        )

    def counts(self) -> dict[str, int]:
        """Parameters of `llm`, `connector` and `vision` (the rest)."""
        llm, connector = self.llm, self.connector
        found = {"llm": 0, "connector": 0, "vision": 0}
        for name, count in self.parameters.items():
            found["llm" if name in llm else "connector" if name in connector else "vision"] += count
        return found

    def targets(self, modules: Iterable[str]) -> tuple[str, ...]:
        """The language model's linear layers with these names.

        Raises:
            ConfigError: one of the names is nowhere in it.
        """
        wanted = tuple(modules)
        ends = {name: name.rsplit(".", 1)[-1] for name in self.linears}
        if absent := [name for name in wanted if name not in ends.values()]:
            raise ConfigError(
                f"adapter.target_modules names {', '.join(absent)}, and the language model of this model has no such "
                f"linear layer; it has {', '.join(sorted(set(ends.values())))}.",
                advice=f"Give adapter.target_modules=[{','.join(sorted(set(ends.values())))}].",
            )
        return tuple(name for name in self.linears if ends[name] in wanted)

    def pattern(self, modules: Iterable[str]) -> str:
        """The full-match pattern of these layers, which PEFT gets as `target_modules`."""
        return rf"{re.escape(self.text)}(?:.*\.)?(?:{'|'.join(re.escape(m) for m in modules)})"


def parts_of(model: Any) -> Parts:
    """
    Args:
        model: Of transformers, with or without weights, before an adapter is put on.

    Raises:
        ModelError: it has no language model of its own.
    """
    decoder = model.get_decoder()
    text = next((name for name, module in model.named_modules() if module is decoder), "")
    if not text or decoder is model:
        raise ModelError(
            f"{type(model).__name__}: its language model cannot be told from its vision tower.",
            advice="model=hf takes models whose get_decoder() is a part of them (LLaVA, PaliGemma, Qwen2-VL, ...).",
        )
    text += "."
    modules = [name for name, _ in model.named_modules() if not name.startswith(text)]
    connectors = tuple(f"{name}." for name in modules if name.rsplit(".", 1)[-1] in _CONNECTORS)
    parameters = {official_name(name): parameter.numel() for name, parameter in model.named_parameters()}
    head = model.get_output_embeddings()
    heads = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    untied = frozenset(
        name for name, p in model.named_parameters() if id(p) in heads and not name.startswith(text)
    )  # a tied head is the embedding, which comes first by its own name
    linears = tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(text) and module is not head
    )
    return Parts(text, connectors, linears, parameters, untied)
