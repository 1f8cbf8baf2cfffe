"""The trainable-set contract: which tensors a stage trains, declared by name and asserted.

Whether exactly these move is checked while training, see `mgm_exp.train.contract`.

Suffix lists hit the CLIP tower too (its attention uses the same names), so nothing here matches by suffix: LoRA
targets are full-match patterns, and the declared names are made from the configuration, not read off the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mgm_exp.errors import ConfigError, ModelError
from mgm_exp.model.configuration import MGMConfig
from mgm_exp.model.tensors import official_name

ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")
LLM_LINEARS = ATTENTION_LINEARS + MLP_LINEARS

CONNECTOR_PATTERN = r"model\.(mm_projector\.[02]|vlm_uni_(query|aux|val)_projector\.[01])\.(weight|bias)"
PROJECTOR_PATTERN = r"model\.mm_projector\.[02]\.(weight|bias)"
LLM_PATTERN = (
    r"model\.(embed_tokens|norm|layers\.\d+\.((self_attn\.[qkvo]_proj)|(mlp\.(gate|up|down)_proj)"
    r"|(input|post_attention)_layernorm))\.(weight|bias)"
)
HEAD_PATTERN = r"lm_head\.weight"  # where it is a tensor of its own
# Adding a constant to all keys of a region changes no softmax: these biases have no gradient but rounding noise
ZERO_GRADIENT = frozenset({"model.vlm_uni_aux_projector.0.bias", "model.vlm_uni_aux_projector.1.bias"})


def lora_targets(modules: Iterable[str]) -> str:
    """The full-match pattern of LLM linears that PEFT gets as `target_modules`.

    Raises:
        ConfigError: a module that is not one of the LLM's seven linears.
    """
    chosen = [m if m.endswith("_proj") else f"{m}_proj" for m in modules]
    unknown = [m for m in chosen if m not in LLM_LINEARS]
    if unknown or not chosen:
        raise ConfigError(
            f"adapter.target_modules {unknown or chosen} cannot be used: allowed are {', '.join(LLM_LINEARS)}."
        )
    attention = [m.removesuffix("_proj") for m in ATTENTION_LINEARS if m in chosen]
    mlp = [m.removesuffix("_proj") for m in MLP_LINEARS if m in chosen]
    groups = [
        rf"{place}\.({'|'.join(letters)})_proj"
        for place, letters in (("self_attn", attention), ("mlp", mlp))
        if letters
    ]
    return rf"model\.layers\.\d+\.({'|'.join(groups)})"


@dataclass(frozen=True)
class TrainableSet:
    """Official names of everything a stage trains.

    Attributes:
        lora, connector, llm: the three groups; projector and mining are a group with their own learning rate.
        patterns: the anchored patterns that the names match, for the record.
        n_lora, n_other: numbers of parameters (LoRA; everything else).
    """

    lora: frozenset[str]
    connector: frozenset[str]
    llm: frozenset[str]
    patterns: tuple[str, ...]
    n_lora: int
    n_other: int

    @property
    def names(self) -> frozenset[str]:
        return self.lora | self.connector | self.llm

    @property
    def connector_names(self) -> frozenset[str]:
        return self.connector

    @property
    def zero_gradient_by_construction(self) -> frozenset[str]:
        """Tensors that need not move in the first update: two biases without effect, and LoRA's A while B = 0."""
        return (ZERO_GRADIENT & self.names) | {n for n in self.lora if n.endswith(".lora_A.weight")}

    def counts(self) -> dict[str, int]:
        return {"n_lora": self.n_lora, "n_other": self.n_other, "n_total": self.n_lora + self.n_other}

    def record(self) -> dict[str, Any]:
        """The form of `manifest.json`'s `trainable`."""
        return {**self.counts(), "patterns": list(self.patterns)}


def connector_names() -> frozenset[str]:
    """The 16 tensors of projector and mining."""
    modules = ["mm_projector.0", "mm_projector.2"]
    modules += [f"vlm_uni_{part}_projector.{i}" for part in ("query", "aux", "val") for i in (0, 1)]
    return frozenset(f"model.{module}.{kind}" for module in modules for kind in ("weight", "bias"))


def llm_names(config: MGMConfig) -> frozenset[str]:
    """All tensors of the LLM; a head that is tied to the embeddings is not counted."""
    names = {"model.embed_tokens.weight", "model.norm.weight"}
    if not config.tie_word_embeddings:
        names.add("lm_head.weight")
    for i in range(config.num_hidden_layers):
        names |= {f"model.layers.{i}.{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")}
        names |= {f"model.layers.{i}.{_home(m)}.{m}.weight" for m in LLM_LINEARS}
        if config.attention_bias:
            names |= {f"model.layers.{i}.self_attn.{m}.bias" for m in ATTENTION_LINEARS}
        if getattr(config, "mlp_bias", False):  # Llama's; Gemma's has none
            names |= {f"model.layers.{i}.mlp.{m}.bias" for m in MLP_LINEARS}
    return frozenset(names)


def lora_names(config: MGMConfig, modules: Iterable[str]) -> frozenset[str]:
    """A and B of every targeted linear, without the adapter's name."""
    chosen = [m if m.endswith("_proj") else f"{m}_proj" for m in modules]
    return frozenset(
        f"model.layers.{i}.{_home(m)}.{m}.lora_{side}.weight"
        for i in range(config.num_hidden_layers)
        for m in chosen
        for side in "AB"
    )


def _home(module: str) -> str:
    return "self_attn" if module in ATTENTION_LINEARS else "mlp"


def set_trainable(model: nn.Module, stage: str, adapter: Any = None, freeze_connector: bool = False) -> TrainableSet:
    """Sets `requires_grad` of every parameter for a stage and asserts that exactly the declared set is trainable.

    Args:
        model: the model, its adapter already applied where the stage has one.
        stage: "align" (projector and mining) or "instruct" (adapter or LLM, and the connector unless frozen).
        adapter: `mgm_exp.config.AdapterConfig` or a mapping with `kind` and `target_modules`; not used for "align".
        freeze_connector: keeps projector and mining as they are in "instruct".

    Raises:
        ModelError: the model lacks a declared tensor, or holds adapter tensors that were not declared.
        ConfigError: an unknown stage or kind of adapter.
    """
    config: MGMConfig = model.config  # type: ignore[assignment]
    lora, llm, patterns = frozenset[str](), frozenset[str](), []
    connector = connector_names()
    if stage == "instruct":
        kind = str(getattr(_get(adapter, "kind"), "value", _get(adapter, "kind")))
        if kind == "lora":
            modules = list(_get(adapter, "target_modules"))
            lora = lora_names(config, modules)
            patterns.append(lora_targets(modules) + r"\.lora_[AB]\.weight")
        elif kind == "full":
            llm = llm_names(config)
            patterns.append(LLM_PATTERN)
            if not config.tie_word_embeddings:
                patterns.append(HEAD_PATTERN)
        else:
            raise ConfigError(f"adapter.kind {kind!r} is not known: allowed are 'full' and 'lora'.")
        connector = frozenset() if freeze_connector else connector
    elif stage != "align":
        raise ConfigError(f"Stage {stage!r} trains nothing: allowed are 'align' and 'instruct'.")
    if connector:
        patterns.append(CONNECTOR_PATTERN)

    declared = lora | connector | llm
    parameters = {official_name(name): p for name, p in model.named_parameters()}
    if missing := sorted(declared - set(parameters)):
        raise ModelError(f"The model lacks {len(missing)} tensors that stage {stage!r} trains, first {missing[0]!r}.")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in declared)
    if stray := sorted(n for n in declared if not any(re.fullmatch(p, n) for p in patterns)):
        raise ModelError(f"{stray[0]!r} is declared trainable but matches none of {patterns}.")
    model.train(model.training)  # towers that just froze go to eval mode
    trainable = TrainableSet(
        lora=lora,
        connector=connector,
        llm=llm,
        patterns=tuple(patterns),
        n_lora=sum(_numel(parameters[n]) for n in lora),
        n_other=sum(_numel(parameters[n]) for n in connector | llm),
    )
    assert_trainable(model, trainable)
    return trainable


def assert_trainable(model: nn.Module, trainable: TrainableSet) -> None:
    """Checks that what requires a gradient is the declared set, no more and no less.

    Raises:
        ModelError: naming what is trained and should not be, and what should be and is not.
    """
    actual = {official_name(n) for n, p in model.named_parameters() if p.requires_grad}
    extra, absent = sorted(actual - trainable.names), sorted(trainable.names - actual)
    if extra or absent:
        raise ModelError(
            f"The trainable set is not the declared one: {len(extra)} extra (first {extra[:1]}), "
            f"{len(absent)} absent (first {absent[:1]})."
        )


def _numel(parameter: Tensor) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _get(section: Any, key: str) -> Any:
    return section[key] if isinstance(section, Mapping) else getattr(section, key)
