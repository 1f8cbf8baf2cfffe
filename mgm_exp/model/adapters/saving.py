"""Putting an adapter into a model, and saving and loading what a stage trained.

The adapter is put into the model in place: the model keeps its class and its names. On disk it has PEFT's own form
where PEFT knows the kind, so that `PeftModel.from_pretrained(load_model(base), folder)` works; what was trained beside
it lies in a file of its own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mgm_exp.config import AdapterKind
from mgm_exp.errors import ModelError
from mgm_exp.model.adapters.base import PEFT_PREFIX, Adapter, by_official_name, copy_exactly
from mgm_exp.model.adapters.connector import has_towers, load_beside, state_beside
from mgm_exp.model.adapters.files import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    CONNECTOR_FILE,
    adapter_files,
    read_adapter,
    read_adapter_config,
    write_tensors,
    write_text,
)
from mgm_exp.model.adapters.kinds import adapter_of, class_of_folder
from mgm_exp.model.layout import LlmLayout
from mgm_exp.model.mgm import MGMForConditionalGeneration
from mgm_exp.model.tensors import official_name

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "preprocessor_config.json",
)


@dataclass(frozen=True)
class Installed:
    """The adapter of a model: its kind (None: it was loaded), its tensors' names, and its `adapter_config.json`."""

    adapter: Adapter | None
    names: frozenset[str]
    stated: dict[str, Any]


def apply_adapter(model: MGMForConditionalGeneration, adapter: Any, seed: int) -> MGMForConditionalGeneration:
    """Puts the adapter of a config into the model (nothing for `kind=full`), in fp32.

    First values are drawn from the seed and the tensor's name: the same on any device and for any set of targets.

    Args:
        model: without an adapter.
        adapter: `mgm_exp.config.AdapterConfig` or a mapping with some of its keys.
        seed: of first values.

    Returns:
        The same object.

    Raises:
        ModelError: the model has an adapter, or the kind was put on other tensors than it declares.
    """
    kind, llm = adapter_of(adapter), layout_of(model)
    if kind.kind is AdapterKind.full:
        return model
    if has_adapter(model):
        raise ModelError("The model has an adapter already.", advice="Merge it, or start from the base model.")
    before = set(by_official_name(model))
    stated = kind.put_in(model, llm, seed)
    added = {n: tuple(p.shape) for n, p in by_official_name(model).items() if n not in before and p.requires_grad}
    if (wanted := kind.added(llm)) != added:
        differing = sorted(n for n in {*wanted, *added} if wanted.get(n) != added.get(n))
        raise ModelError(f"The adapter was put on other layers than declared: {differing[:3]}.")
    names = frozenset(added) | frozenset(kind.tuned(llm))
    model.installed_adapter = Installed(kind, names, stated)  # type: ignore[assignment]
    return model


def layout_of(model: nn.Module) -> LlmLayout:
    """Where the parts of a model's LLM lie, as the model says."""
    layout: LlmLayout = model.llm_layout  # type: ignore[assignment]
    return layout


def installed(model: nn.Module) -> Installed | None:
    """The model's adapter; None: it has none."""
    found: Installed | None = getattr(model, "installed_adapter", None)  # type: ignore[assignment]
    return found


def has_adapter(model: nn.Module) -> bool:
    return installed(model) is not None


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors by official name (`model.layers.0.self_attn.q_proj.lora_A.weight`), on the CPU."""
    return {n: t.detach().cpu().contiguous() for n, t in _own(model).items()}


def save_adapter(
    model: MGMForConditionalGeneration,
    folder: str | Path,
    *,
    base_name: str | None = None,
    adapter: Mapping[str, Tensor] | None = None,
    connector: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes `adapter_model.safetensors`, `adapter_config.json` and `non_lora_trainables.safetensors`.

    Args:
        model: with an adapter.
        folder: made if it is not there; its files are replaced one by one, each whole.
        base_name: portable name of the base in `adapter_config.json`; None: the base folder's last component.
        adapter, connector: tensors by official name where the model's own are sharded; None: the model's.
    """
    folder = Path(folder)
    found = installed(model)
    if found is None:
        raise ModelError("The model has no adapter to save.", advice="A full fine-tuning is saved with save_full.")
    if found.adapter is None:
        raise ModelError("This adapter was loaded from a folder.", advice="Copy that folder: it holds all there is.")
    folder.mkdir(parents=True, exist_ok=True)
    state = dict(adapter if adapter is not None else adapter_state(model))
    stated, tensors = found.adapter.to_files(dict(found.stated), state)
    named = base_name or Path(getattr(model, "source_folder", "") or "mgm").name
    stated = {**stated, "base_model_name_or_path": named, "inference_mode": True}
    write_tensors(folder / ADAPTER_FILE, tensors)
    write_text(folder / ADAPTER_CONFIG, json.dumps(stated, indent=2, sort_keys=True) + "\n")
    beside = connector if connector is not None else state_beside(model)
    write_tensors(folder / CONNECTOR_FILE, {PEFT_PREFIX + n: t for n, t in beside.items()})


def load_adapter(model: MGMForConditionalGeneration, folder: str | Path) -> MGMForConditionalGeneration:
    """Applies a saved adapter, and what was trained beside it, to its base model.

    Raises:
        ModelError: no adapter folder, tensors for other layers or of another size, a damaged file.
    """
    folder = Path(folder)
    weights, connector = adapter_files(folder)
    if has_adapter(model):
        raise ModelError("The model has an adapter already.", advice="Apply it to the base model.")
    stated, tensors = read_stated(folder)
    if weights.suffix == ".bin":  # suffixes, which hit CLIP too: the official code added LoRA before the towers
        stated["target_modules"] = sorted({n.rsplit(".lora_", 1)[0] for n in tensors})
    kind = class_of_folder(stated, folder)
    names = kind.open(model, layout_of(model), stated, kind.from_files(stated, tensors))
    model.installed_adapter = Installed(None, names, stated)  # type: ignore[assignment]
    if connector is not None:
        load_beside(model, connector)
    model.requires_grad_(False)
    return model


def merge_adapter(model: MGMForConditionalGeneration, folder: str | Path) -> MGMForConditionalGeneration:
    """Adds a saved adapter to the weights of its base model, and puts in what was trained beside it.

    The weights that change are new tensors, made in fp32: those of the base, which others may use too, stay as they
    are. A kind that only replaces tensors of the base (BitFit) is loaded.

    Raises:
        ModelError: as :func:`load_adapter`, or a kind that cannot be merged.
    """
    folder = Path(folder)
    _, beside = adapter_files(folder)
    stated, tensors = read_stated(folder)
    kind = class_of_folder(stated, folder)
    if kind.changes_base:
        return load_adapter(model, folder)
    if has_adapter(model):
        raise ModelError("The model has an adapter already.", advice="Apply it to the base model.")
    add_to_weights(model, kind, stated, tensors)
    if beside is not None:
        load_beside(model, beside)
    model.requires_grad_(False)
    return model


def add_to_weights(
    model: nn.Module, kind: type[Adapter], stated: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Adds an adapter, as its folder says it is, to the weights of a model that has none: new tensors in their places.

    Raises:
        ModelError: it does not fit, or cannot be merged.
    """
    names = {official_name(name): name for name, _ in model.named_parameters()}
    shapes = {name: tuple(model.get_parameter(own).shape) for name, own in names.items()}
    merge = kind.merged_weights(stated, kind.from_files(stated, tensors), shapes)
    with torch.no_grad():
        for name, parts in merge.changed.items():
            weight = model.get_parameter(names[name])
            there = {key: part.to(weight.device) for key, part in parts.items()}
            # In fp32: in 16 bits a small update is lost before it is added
            merged = kind.merged(weight.float(), there, merge).to(weight.dtype)
            home, _, last = names[name].rpartition(".")
            setattr(model.get_submodule(home), last, nn.Parameter(merged, requires_grad=False))


def changes_base(folder: Path) -> bool:
    """Whether :func:`load_adapter` would write into tensors of the base other than the connector's.

    Raises:
        ModelError: no adapter folder, one of another kind, or a damaged one.
    """
    _, beside = adapter_files(folder)
    if class_of_folder(read_adapter_config(folder), folder).changes_base:
        return True
    return beside is not None and has_towers(beside)


def read_stated(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`adapter_config.json` of an adapter folder, and its tensors by official name as they are in the file.

    Raises:
        ModelError: a damaged file, or one that asks PEFT for more than the kinds of this package do.
    """
    weights, _ = adapter_files(folder)
    stated = read_adapter_config(folder)
    return stated, read_adapter(weights)


def put_adapter(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies adapter tensors by official name; the names must be exactly the model's."""
    copy_exactly(_own(model), tensors, "adapter", widen=True)


def save_full(
    model: MGMForConditionalGeneration, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Writes a complete model folder: official names, both towers, config.json and the tokenizer of its base.

    Args:
        state_dict: all tensors by official name where the model's own are sharded; None: the model's.

    Raises:
        ModelError: the model has an adapter (merge it first).
    """
    if has_adapter(model):
        raise ModelError("A model with an adapter is saved with save_adapter, or merged first.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(state_dict) if state_dict is not None else dict(by_official_name(model))  # a tied head appears once
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(str(folder))
    model.generation_config.save_pretrained(str(folder))
    write_tensors(folder / "model.safetensors", tensors)
    source = Path(getattr(model, "source_folder", "") or ".")
    for name in TOKENIZER_FILES:
        if (source / name).is_file() and source.resolve() != folder.resolve():
            shutil.copyfile(source / name, folder / name)


def _own(model: nn.Module) -> dict[str, nn.Parameter]:
    found = installed(model)
    names = found.names if found is not None else frozenset[str]()
    return {n: p for n, p in by_official_name(model).items() if n in names}
