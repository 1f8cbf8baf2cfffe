"""From a folder's `config.json` (and the towers' own) to a complete `MGMConfig`. Reads no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mgm_exp.errors import ModelError
from mgm_exp.model.backbones import MODEL_TYPES, backbone_of_type
from mgm_exp.model.configuration import CLIP_VIT_L_14_336, CONFIGS, CONVNEXT_LARGE, MGMConfig
from mgm_exp.model.folders import ModelSource, find_tower, read_json, stated_clip_size
from mgm_exp.model.tensors import convnext_shape, tensor_map

_CLIP_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "projection_dim",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
)


def resolve_config(source: ModelSource) -> MGMConfig:
    """The full configuration of a model: the folder's own, plus what it leaves to the tower folders.

    Raises:
        ModelError: another architecture, a field that does not fit, or a tower that cannot be described.
    """
    path = source.folder / "config.json"
    fields = read_json(path)
    model_type = fields.pop("model_type", None)
    backbone = backbone_of_type(model_type)
    if backbone is None:
        raise ModelError(
            f"{path} is of architecture {model_type!r}; allowed are {', '.join(map(repr, MODEL_TYPES))}.",
            advice="Give an MGM-2B, 7B, 8B or 13B folder, or the folder of a Gemma, Vicuna or Llama to start stage 1 "
            "from. MGM-8x7B (Mixtral) is not supported.",
        )
    is_plain = model_type == backbone.plain
    for key in ("architectures", "transformers_version", "auto_map", "_name_or_path", "quantization_config"):
        fields.pop(key, None)
    fields |= source.config_overrides
    own = fields.get("hidden_act", "silu")
    if backbone.name == "llama" and fields.get("hidden_activation") not in (None, own):
        raise ModelError(
            f"model.hidden_activation={fields['hidden_activation']} does not fit {path}, a Llama trained with {own}.",
            advice="Leave it out: the key is there for Gemma folders, whose config.json names another form.",
        )
    try:
        config = CONFIGS[backbone.name](**fields)
    except Exception as error:  # the strict dataclass raises its own validation errors
        detail = " ".join(str(error).split())
        raise ModelError(f"{path} has a field that does not fit: {detail}") from error
    if config.tokenizer_padding_side not in ("left", "right"):
        raise ModelError(f"{path}: tokenizer_padding_side {config.tokenizer_padding_side!r} is neither left nor right.")
    _check_activation(config, path)
    config.vision_config = config.vision_config or _clip_config(source, config, is_plain)
    config.vision_aux_config = config.vision_aux_config or _convnext_config(source, config, is_plain)
    _check_views(config, path)
    if is_plain:
        config.mm_hidden_size = int(config.vision_config["hidden_size"])
        config.mm_hidden_size_aux = sum(config.vision_aux_config["dims"])
    return config


def _check_activation(config: MGMConfig, path: Path) -> None:
    from transformers.activations import ACT2FN

    if config.activation not in ACT2FN:
        raise ModelError(
            f"{path}: activation {config.activation!r} is not known.",
            advice="Gemma uses 'gelu_pytorch_tanh' or 'gelu' (the erf form); set model.hidden_activation.",
        )


def _check_views(config: MGMConfig, path: Path) -> None:
    """Each patch of each crop must have a whole square of the high-resolution map below it."""
    clip = config.vision_config or {}
    patches = clip["image_size"] // clip["patch_size"] * max(config.image_grid, 1)
    if config.image_grid < 1 or config.image_size_aux % 32 or (config.image_size_aux // 4) % patches:
        raise ModelError(
            f"image_size_aux={config.image_size_aux} and image_grid={config.image_grid} do not fit {path}: its CLIP "
            f"tower gives {patches} x {patches} patches of all crops, and the map of the other tower (a quarter of the "
            "side, which is a multiple of 32) must have the same whole number of pixels for each.",
            advice="Take 768 pixels without a grid, or model.image_grid=2 and model.image_size_aux=1536.",
        )


def _clip_config(source: ModelSource, config: MGMConfig, is_plain: bool) -> dict[str, Any]:
    folder = find_tower(source, source.vision_tower, config.mm_vision_tower)
    stated = None if is_plain else stated_clip_size(config.mm_vision_tower)
    if folder is not None:
        fields = read_json(folder / "config.json")
        fields = {**fields, **fields.get("vision_config", {})}  # a whole CLIP keeps its vision half one level down
        clip = {k: fields[k] for k in _CLIP_FIELDS if k in fields}
        needed = {"hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size"}
        if missing := sorted(needed - set(clip)):
            raise ModelError(f"{folder / 'config.json'} is not a CLIP vision config: {', '.join(missing)} missing.")
        found = (clip["patch_size"], clip["image_size"])
        if stated is not None and found != stated:
            raise ModelError(
                f"The CLIP tower in {folder} takes {found[1]} px images in patches of {found[0]}, but this checkpoint "
                f"was trained with {config.mm_vision_tower!r}: {stated[1]} px, patches of {stated[0]}.",
                advice="Give the tower that the name states (officially openai/clip-vit-large-patch14-336).",
            )
        return clip
    if stated == (14, 336) and "large" in str(config.mm_vision_tower):
        return dict(CLIP_VIT_L_14_336)  # the towers may lie inside the checkpoint
    raise ModelError(
        f"The CLIP tower of {source.folder} is not described: its config.json names {config.mm_vision_tower!r}, and no "
        "folder of that name lies in the model folder, beside it or in towers/ beside it.",
        advice="Set model.vision_tower to the folder of openai/clip-vit-large-patch14-336.",
    )


def _convnext_config(source: ModelSource, config: MGMConfig, is_plain: bool) -> dict[str, Any]:
    inside = {} if is_plain else convnext_shape(tensor_map(source.folder))
    if inside:
        return inside
    folder = find_tower(source, source.vision_tower_aux, config.mm_vision_tower_aux)
    if folder is not None:
        found = convnext_shape(tensor_map(folder))
        if not found:
            raise ModelError(
                f"{folder} holds no ConvNeXt tower: no tensor is named visual.trunk.stem.* or vision_stem.*.",
                advice="Give the folder of laion/CLIP-convnext_large_d_320 (open_clip format).",
            )
        return found
    if "convnext-large" in str(config.mm_vision_tower_aux) and config.mm_hidden_size_aux == 2880:
        return dict(CONVNEXT_LARGE)
    raise ModelError(
        f"The ConvNeXt tower of {source.folder} is not described: its config.json names "
        f"{config.mm_vision_tower_aux!r}, and no folder of that name lies in the model folder, beside it or in towers/ "
        "beside it.",
        advice="Set model.vision_tower_aux to the folder of laion/CLIP-convnext_large_d_320.",
    )
