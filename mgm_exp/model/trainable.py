"""The trainable-set contract: which tensors a stage trains, declared by name and asserted.

Whether exactly these move is checked while training, see `mgm_exp.train.contract`.

Suffix lists hit the CLIP tower too (its attention uses the same names), so nothing here matches by suffix: LoRA
targets are full-match patterns, and the declared names are made from the configuration, not read off the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from mgm_exp.errors import ConfigError, ModelError
from mgm_exp.model.configuration import MGMConfig
from mgm_exp.model.layout import LlmLayout
from mgm_exp.model.tensors import CLIP_PREFIX, CONVNEXT_PREFIX, official_name

CONNECTOR_PATTERN = r"model\.(mm_projector\.[02]|vlm_uni_(query|aux|val)_projector\.[01])\.(weight|bias)"
PROJECTOR_PATTERN = r"model\.mm_projector\.[02]\.(weight|bias)"
# Adding a constant to all keys (of a region) changes no softmax: these biases have no gradient but rounding noise
ZERO_GRADIENT = frozenset({"model.vlm_uni_aux_projector.0.bias", "model.vlm_uni_aux_projector.1.bias"})


@dataclass(frozen=True)
class TrainableSet:
    """Official names of everything a stage trains.

    Attributes:
        lora: tensors that the adapter put in, of whatever kind.
        connector: projector and mining, a group with their own learning rate.
        llm: the LLM's own tensors.
        patterns: the anchored patterns that the names match, for the record.
        n_lora, n_other: numbers of parameters (the adapter's; everything else).
        towers: what is trained of the vision towers, a group with its own learning rate.
        late: tensors without a gradient in the first update, because a factor is still zero.
        uncertain: tensors that need never move.
        rates: name -> multiple of its group's learning rate, where it is not 1.
    """

    lora: frozenset[str]
    connector: frozenset[str]
    llm: frozenset[str]
    patterns: tuple[str, ...]
    n_lora: int
    n_other: int
    towers: frozenset[str] = frozenset()
    late: frozenset[str] = frozenset()
    uncertain: frozenset[str] = frozenset()
    rates: Mapping[str, float] = field(default_factory=dict)

    @property
    def names(self) -> frozenset[str]:
        return self.lora | self.connector | self.llm | self.towers

    @property
    def connector_names(self) -> frozenset[str]:
        return self.connector

    @property
    def zero_gradient_by_construction(self) -> frozenset[str]:
        """Tensors that need not move in the first update: biases without effect, and LoRA's A while B = 0."""
        return self.never_certain | self.late

    @property
    def never_certain(self) -> frozenset[str]:
        """Tensors whose true gradient is zero, or that may be set back: whether they move says nothing."""
        keys = {n for n in self.towers if n.endswith(".k_proj.bias")}  # for the same reason, in CLIP's attention
        return (ZERO_GRADIENT & self.names) | self.uncertain | keys

    @property
    def needs_images(self) -> frozenset[str]:
        """Tensors without a gradient in a batch without images."""
        return self.connector | self.towers

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


def tower_names(config: MGMConfig, *, low: bool, high: bool) -> frozenset[str]:
    """What the official switches train of the towers.

    Args:
        low: `optimize_vision_tower`: the later half of CLIP's layers. The official code sets the last layer too, which
            is never run with `mm_vision_select_layer` -2; here only layers that are run are declared.
        high: `optimize_vision_tower_aux`: the last block of each ConvNeXt stage.

    Source: github.com/dvlab-research/MGM, mgm/train/train.py (Apache-2.0).
    """
    names: set[str] = set()
    if low:
        clip = config.vision_config or {}
        layers = clip["num_hidden_layers"]
        for i in range(layers // 2, config.mm_vision_select_layer % (layers + 1)):
            for part in ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2", *(f"self_attn.{a}" for a in _CLIP)):
                names |= {f"{CLIP_PREFIX}encoder.layers.{i}.{part}.{kind}" for kind in ("weight", "bias")}
    if high:
        for stage, depth in enumerate((config.vision_aux_config or {})["depths"]):
            block = f"{CONVNEXT_PREFIX}vision_stages.{stage}.blocks.{depth - 1}"
            names.add(f"{block}.gamma")
            for part in ("conv_dw", "norm", "mlp.fc1", "mlp.fc2"):
                names |= {f"{block}.{part}.{kind}" for kind in ("weight", "bias")}
    return frozenset(names)


_CLIP = ("q_proj", "k_proj", "v_proj", "out_proj")
TOWER_PATTERNS = {
    "low": re.escape(CLIP_PREFIX) + r"encoder\.layers\.\d+\.(layer_norm[12]|mlp\.fc[12]|self_attn\.\w+)\.(weight|bias)",
    "high": re.escape(CONVNEXT_PREFIX)
    + r"vision_stages\.\d+\.blocks\.\d+\.(gamma|(conv_dw|norm|mlp\.fc[12])\.(weight|bias))",
}


def llm_names(config: MGMConfig) -> frozenset[str]:
    """All tensors of the LLM; the head is tied to the embeddings and not counted."""
    return frozenset(LlmLayout.of(config).names())


def lora_targets(modules: Iterable[str], config: MGMConfig) -> str:
    """The full-match pattern of LLM linears that PEFT gets as `target_modules`.

    Raises:
        ConfigError: a module that is not one of the LLM's seven linears.
    """
    return LlmLayout.of(config).targets(modules)


def set_trainable(
    model: nn.Module,
    stage: str,
    adapter: Any = None,
    freeze_connector: bool = False,
    *,
    vision_tower: bool = False,
    vision_tower_aux: bool = False,
) -> TrainableSet:
    """Sets `requires_grad` of every parameter for a stage and asserts that exactly the declared set is trainable.

    Args:
        model: the model, its adapter already applied where the stage has one.
        stage: "align" (projector and mining) or "instruct" (adapter or LLM, and the connector unless frozen).
        adapter: `mgm_exp.config.AdapterConfig` or a mapping with some of its keys; not used for "align".
        freeze_connector: keeps projector and mining as they are in "instruct".
        vision_tower, vision_tower_aux: the official switches, in "instruct"; see `tower_names`.

    Raises:
        ModelError: the model lacks a declared tensor, or holds adapter tensors that were not declared.
        ConfigError: an unknown stage or kind of adapter, or one that trains nothing.
    """
    from mgm_exp.model.adapters.kinds import adapter_of

    lora, llm, towers, patterns = frozenset[str](), frozenset[str](), frozenset[str](), []
    late, uncertain, rates = frozenset[str](), frozenset[str](), dict[str, float]()
    connector = connector_names()
    if stage == "instruct":
        kind, layout = adapter_of(adapter), model.llm_layout
        assert isinstance(layout, LlmLayout)
        lora, llm = frozenset(kind.added(layout)), frozenset(kind.tuned(layout))
        late, uncertain, rates = frozenset(kind.late(layout)), frozenset(kind.uncertain(layout)), kind.rates(layout)
        patterns += kind.patterns(layout)
        connector = frozenset() if freeze_connector else connector
        if vision_tower or vision_tower_aux:
            towers = tower_names(model.config, low=vision_tower, high=vision_tower_aux)  # type: ignore[arg-type]
            patterns += [TOWER_PATTERNS["low"]] if vision_tower else []
            patterns += [TOWER_PATTERNS["high"]] if vision_tower_aux else []
    elif stage != "align":
        raise ConfigError(f"Stage {stage!r} trains nothing: allowed are 'align' and 'instruct'.")
    if connector:
        patterns.append(CONNECTOR_PATTERN)

    declared = lora | connector | llm | towers
    parameters = {official_name(name): p for name, p in model.named_parameters()}
    if missing := sorted(declared - set(parameters)):
        raise ModelError(f"The model lacks {len(missing)} tensors that stage {stage!r} trains, first {missing[0]!r}.")
    for name, parameter in parameters.items():
        if name in declared or parameter.is_floating_point():  # 4-bit weights cannot be asked
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
        n_other=sum(_numel(parameters[n]) for n in connector | llm | towers),
        towers=towers,
        late=late,
        uncertain=uncertain,
        rates=rates,
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
