"""One SHA-256 for a model: the same for a folder and for the model loaded from it, however the files are split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mgm_exp.model.backbones import GEMMA
from mgm_exp.model.configuration import MGMConfig
from mgm_exp.model.folders import ModelSource, find_source, source_of_section
from mgm_exp.model.loading import plan_tensors
from mgm_exp.model.resolve import resolve_config
from mgm_exp.model.tensors import official_name, read_tensors

# What changes a model's answers besides its tensors
_BEHAVIOUR = (
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_parameters",
    "mm_vision_select_layer",
    "mm_projector_type",
    "image_grid",
    "image_global",
    "image_size_aux",
)
_CLIP_BEHAVIOUR = ("num_attention_heads", "hidden_act", "layer_norm_eps", "image_size", "patch_size")


def model_fingerprint(model_or_folder: nn.Module | str | Path) -> str:
    """SHA-256 (hex) over official tensor names, shapes, dtypes and bytes, and the settings that change answers.

    Independent of key prefixes, of how files are split and of where the towers lie. A tied head is not counted. A
    prompt, a prefix and VeRA's shared matrices have other names in a folder than in memory: compare like with like.

    Args:
        model_or_folder: a model, or anything `load_model` takes.

    Raises:
        ModelError: the folder cannot be read.
    """
    if isinstance(model_or_folder, nn.Module):
        config: MGMConfig = model_or_folder.config  # type: ignore[assignment]
        return _digest(config, _model_tensors(model_or_folder))
    source = find_source(model_or_folder)
    return _source_fingerprint(source)


def section_fingerprint(section: dict[str, Any]) -> str:
    """The fingerprint of the model that a `model` section describes (its towers and activation included)."""
    return _source_fingerprint(source_of_section(section))


def _source_fingerprint(source: ModelSource) -> str:
    config = resolve_config(source)
    places = plan_tensors(source, config).places

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from read_tensors(places)
        if source.adapter is not None:
            from mgm_exp.model.adapters import CONNECTOR_FILE, class_of_folder, read_safetensors, read_stated

            stated, own = read_stated(source.adapter)
            yield from class_of_folder(stated, source.adapter).from_files(stated, own).items()
            if (source.adapter / CONNECTOR_FILE).is_file():
                for key, tensor in read_safetensors(source.adapter / CONNECTOR_FILE).items():
                    yield official_name(key), tensor

    return _digest(config, tensors())


def _model_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if not name.endswith(".ranknum.default"):  # a number that PEFT keeps as a parameter
            yield official_name(name), parameter


def _digest(config: MGMConfig, tensors: Iterator[tuple[str, Tensor]]) -> str:
    each: dict[str, str] = {}
    for name, tensor in tensors:
        flat = tensor.detach().cpu().contiguous()
        head = f"{name} {flat.dtype} {list(flat.shape)}\n".encode()
        body = flat.reshape(-1).view(torch.uint8).numpy()
        digest = hashlib.sha256(head)
        digest.update(body.data)
        each[name] = digest.hexdigest()  # a later file (an adapter's connector) replaces the base's tensor
    behaviour: dict[str, Any] = {key: getattr(config, key) for key in _BEHAVIOUR}
    behaviour["activation"] = config.activation
    if config.backbone is not GEMMA:  # norms and embeddings of the same names compute other things
        behaviour["backbone"] = config.backbone.name
    clip = config.vision_config or {}
    behaviour["clip"] = {key: clip.get(key) for key in _CLIP_BEHAVIOUR}
    total = hashlib.sha256(json.dumps(behaviour, sort_keys=True, default=str).encode())
    for name in sorted(each):
        total.update(f"{name} {each[name]}\n".encode())
    return total.hexdigest()
