"""The sizes of a model from its description alone: every tensor's shape on the meta device, and the sides that matter.

No weights are read. The tensors are those of the model's own code, built without memory, so a count cannot drift from
what is trained; it takes some seconds for the first cell of a process and nothing for the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgm_exp.config import AdapterConfig, AdapterKind, ModelConfig, ModelFamily
from mgm_exp.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from mgm_exp.model.configuration import MGMConfig
    from mgm_exp.model.layout import LlmLayout

_VIEWS = ("image_grid", "image_global", "image_size_aux")
PARTS = ("llm", "vision_tower", "vision_tower_aux", "mining", "projector")


@dataclass(frozen=True)
class Architecture:
    """A model's sizes.

    Args:
        shapes: Official name -> shape of every tensor; a tied head is not counted twice.
        hidden, mlp, layers, heads, kv_heads, head_dim, vocabulary: Of the LLM.
        visual_tokens: Embeddings that take the place of one image.
        clip_width, clip_mlp, clip_layers, clip_tokens: Of the low-resolution tower; the layers that are run.
        grid, has_global: HD mode: g x g crops, and one view of the whole image.
        map_side: Of the high-resolution map; its positions are ``map_side ** 2``.
        map_widths, map_depths: Channels and blocks of its stages.
        llm: Names and sizes of the LLM's parts.
        tunable: Parameters that the official switches train of the two towers.
        clip_tuned: Layers of the low-resolution tower that its switch trains.
        note: What was assumed; empty where the description was read from the checkpoint.
        is_head_whole: Whether the head's logits are made for all learnt positions at once, and kept.
    """

    shapes: Mapping[str, tuple[int, ...]]
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    visual_tokens: int
    clip_width: int
    clip_mlp: int
    clip_layers: int
    clip_tokens: int
    grid: int
    has_global: bool
    map_side: int
    map_widths: tuple[int, ...]
    map_depths: tuple[int, ...]
    llm: LlmLayout
    tunable: tuple[int, int]
    clip_tuned: int
    note: str = ""
    is_head_whole: bool = False

    @property
    def views(self) -> int:
        """Images that go through the low-resolution tower for one sample."""
        return self.grid**2 + int(self.has_global) if self.grid > 1 else 1

    @property
    def positions(self) -> int:
        """Positions that mining reads for one sample: the map's, and those of a smaller map for a global view."""
        with_global = self.grid > 1 and self.has_global
        return self.map_side**2 + ((self.map_side // self.grid) ** 2 if with_global else 0)

    @property
    def map_width(self) -> int:
        return sum(self.map_widths)

    def linear(self, module: str) -> tuple[int, int]:
        """(outputs, inputs) of one of the seven linear layers of an LLM block."""
        home = "self_attn" if module[0] in "qkvo" else "mlp"
        shape = self.shapes.get(f"model.layers.0.{home}.{module}.weight")
        if shape is None:
            raise ConfigError(f"adapter.target_modules names {module}, which a block of the language model has not.")
        return shape[0], shape[1]


@dataclass(frozen=True)
class Parameters:
    """How many parameters each part has, the adapter included, and what a stage trains of them.

    Args:
        lora: Of the adapter (0 in the align stage's own count, which has none).
        trained_llm: Weights of the LLM that are trained.
        trained_connector: Projector and mining, where they are trained.
        trained_towers: What the official switches train of the towers.
    """

    llm: int
    vision_tower: int
    vision_tower_aux: int
    mining: int
    projector: int
    lora: int
    trained_llm: int
    trained_connector: int
    trained_towers: int = 0

    @property
    def total(self) -> int:
        return self.llm + self.towers + self.mining + self.projector + self.lora

    @property
    def towers(self) -> int:
        return self.vision_tower + self.vision_tower_aux

    @property
    def trainable(self) -> int:
        return self.lora + self.trained_llm + self.trained_connector + self.trained_towers

    def trained(self) -> dict[str, int]:
        """What is trained, by part: ``adapter`` (LoRA and the like), ``llm``, ``connector``, ``towers``."""
        return {
            "adapter": self.lora,
            "llm": self.trained_llm,
            "connector": self.trained_connector,
            "towers": self.trained_towers,
        }

    def to_json(self) -> dict[str, int]:
        names = ("llm", "vision_tower", "vision_tower_aux", "mining", "projector", "lora", "total", "trainable")
        return {name: getattr(self, name) for name in names}


def architecture_of(section: ModelConfig) -> Architecture:
    """The sizes of the model that a ``model`` section names.

    Where ``model.path`` holds a ``config.json`` that one is read; else the published sizes of ``model.name`` are taken,
    and the note says so.

    Raises:
        ModelError: neither is there.
    """
    path = Path(section.path).expanduser() if section.path else None
    if section.family is ModelFamily.hf:
        return _of_other(path)
    has_description = path is not None and (path / "config.json").is_file()
    return _architecture(
        section.name,
        str(path) if has_description else None,
        section.vision_tower,
        section.vision_tower_aux,
        tuple((key, getattr(section, key)) for key in _VIEWS if getattr(section, key) is not None),
        (path / "config.json").stat().st_mtime_ns if has_description and path is not None else 0,
        "" if has_description or path is None else f"model.path={section.path} holds no config.json",
    )


def _of_other(path: Path | None) -> Architecture:
    """A model of transformers has no published sizes here: its description must be there."""
    from mgm_exp.plan.other_models import sizes_of_other

    if path is None or not (path / "config.json").is_file():
        raise ModelError(
            "model=hf is planned from the model's own config.json, and "
            + ("model.path is not set." if path is None else f"model.path={path} holds none."),
            advice="Give model.path=/folder/with/config.json and the processor's files (weights are not needed).",
        )
    return sizes_of_other(str(path), (path / "config.json").stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _architecture(
    name: str,
    path: str | None,
    tower: str | None,
    tower_aux: str | None,
    views: tuple[tuple[str, Any], ...],
    stamp: int,
    missing: str,
) -> Architecture:
    from mgm_exp.model import KNOWN, known_config, source_of_section
    from mgm_exp.model.resolve import resolve_config

    if path is not None or name == "tiny":
        section: dict[str, Any] = {"path": path, **dict(views)}
        for key, given in (("vision_tower", tower), ("vision_tower_aux", tower_aux)):
            section[key] = given if given and Path(given).expanduser().is_dir() else None
        return _sizes(resolve_config(source_of_section(section)), "")
    if name not in KNOWN:
        raise ModelError(
            f"model.name={name} has no published sizes here{f', and {missing}' if missing else ''}.",
            advice=f"Give model.path=/folder/with/config.json, or one of model={','.join(KNOWN)}.",
        )
    note = f"the sizes of {KNOWN[name].title} are taken ({missing or 'model.path is not set'})"
    config = known_config(name)
    for key, value in views:
        setattr(config, key, value)
    return _sizes(config, note)


def _sizes(config: MGMConfig, note: str) -> Architecture:
    from mgm_exp.model import meta_model, official_name
    from mgm_exp.model.layout import LlmLayout, n_elements
    from mgm_exp.model.trainable import tower_names

    shapes = {official_name(name): tuple(p.shape) for name, p in meta_model(config).named_parameters()}
    clip, aux = config.vision_config or {}, config.vision_aux_config or {}
    n_states = clip["num_hidden_layers"] + 1
    return Architecture(
        shapes=shapes,
        hidden=config.hidden_size,
        mlp=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocabulary=config.vocab_size,
        visual_tokens=config.visual_tokens_per_image,
        clip_width=clip["hidden_size"],
        clip_mlp=clip["intermediate_size"],
        clip_layers=config.mm_vision_select_layer % n_states,
        clip_tokens=(clip["image_size"] // clip["patch_size"]) ** 2 + 1,
        grid=config.image_grid,
        has_global=config.image_global,
        map_side=config.image_size_aux // 4,
        map_widths=tuple(aux["dims"]),
        map_depths=tuple(aux["depths"]),
        llm=LlmLayout.of(config),
        tunable=(
            n_elements(shapes[name] for name in tower_names(config, low=True, high=False)),
            n_elements(shapes[name] for name in tower_names(config, low=False, high=True)),
        ),
        clip_tuned=config.mm_vision_select_layer % n_states - clip["num_hidden_layers"] // 2,
        note=note,
    )


def parameters_of(
    sizes: Architecture,
    stage: str,
    adapter: AdapterConfig,
    *,
    is_connector_frozen: bool,
    tower: bool = False,
    tower_aux: bool = False,
) -> Parameters:
    """Exact counts for a stage: those of the tensors that the adapter declares.

    Args:
        stage: ``align`` (connector), ``features`` (nothing) or ``instruct`` (adapter or LLM, and the connector unless
            it is frozen).
        tower, tower_aux: What instruct trains of the towers, by the official switches.
    """
    counts = _part_counts(sizes)
    lora = trained_llm = trained_towers = 0
    if stage == "instruct":
        from mgm_exp.model.adapters import adapter_of
        from mgm_exp.model.layout import n_elements

        kind = adapter_of(adapter)
        lora = n_elements(kind.added(sizes.llm).values())
        trained_llm = n_elements(kind.tuned(sizes.llm).values())
        trained_towers = sizes.tunable[0] * tower + sizes.tunable[1] * tower_aux
    trains_connector = stage == "align" or (stage == "instruct" and not is_connector_frozen)
    connector = counts["mining"] + counts["projector"] if trains_connector else 0
    return Parameters(
        **counts, lora=lora, trained_llm=trained_llm, trained_connector=connector, trained_towers=trained_towers
    )


def targets_of(adapter: AdapterConfig) -> tuple[str, ...]:
    """The linear layers of a block whose inputs an update keeps, with their full names."""
    return () if adapter.kind is AdapterKind.bottleneck else tuple(_targets(adapter))


def _targets(adapter: AdapterConfig) -> list[str]:
    return [module if module.endswith("_proj") else f"{module}_proj" for module in adapter.target_modules]


def _part_counts(sizes: Architecture) -> dict[str, int]:
    return _counted(tuple(sizes.shapes.items()))


@lru_cache(maxsize=8)
def _counted(shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> dict[str, int]:
    counts = dict.fromkeys(PARTS, 0)
    for name, shape in shapes:
        counts[part_of(name)] += math.prod(shape)
    return counts


def part_of(name: str) -> str:
    """The part of the model that a tensor belongs to, by its official name."""
    if name.startswith("model.vision_tower_aux."):
        return "vision_tower_aux"
    if name.startswith("model.vision_tower."):
        return "vision_tower"
    if name.startswith("model.mm_projector."):
        return "projector"
    return "mining" if name.startswith("model.vlm_uni_") else "llm"
