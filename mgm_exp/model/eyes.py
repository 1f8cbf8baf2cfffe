"""What decides on the bits of an image's features: everything but the image, as plain values that a key is made of."""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Any

import PIL
import torch
import transformers

from mgm_exp.model.adapters import connector_state
from mgm_exp.model.features import TIERS, TOKENS, bytes_of_tier, sha256_of, tensors_sha256
from mgm_exp.model.native_mining import ARITHMETIC


def pixels_of(settings: Any) -> dict[str, Any]:
    """What decides on the pixels that a processor makes, but for the aspect, which an image's name holds.

    Args:
        settings: `mgm_exp.model.processor.PixelSettings`.
    """
    return {**asdict(settings), "mean": list(settings.mean), "std": list(settings.std), "pillow": PIL.__version__}


def resized_of(settings: Any) -> dict[str, Any]:
    """The same for images that are resized and not yet normalised: both resolutions are made of one square."""
    wanted = pixels_of(settings)
    return {key: wanted[key] for key in ("image_size_aux", "mean", "resample", "pillow")}


def eyes_of(model: Any, tier: str, settings: Any, *, batch: int, half: torch.dtype | None) -> dict[str, Any]:
    """What decides on features of a tier.

    Args:
        model: The MGM.
        settings: Of its processor.
        batch: Images in one pass through the towers.
        half: The type that is computed in under autocast; None: there is no autocast.

    Returns:
        Tensors by their hash, their types, the machine's arithmetic, versions of what computes.
    """
    body = model.model
    tower = body.vision_tower
    first = next(tower.parameters())
    config = model.config
    found: dict[str, Any] = {
        "tier": tier,
        "pixels": pixels_of(settings),
        "clip": [tensors_sha256(tower), tower.n_layers_used, *_behaviour(tower.config)],
        "attention": str(tower.config._attn_implementation),
        "dtype": str(first.dtype),
        "autocast": None if half is None else str(half),
        "batch": batch,
        "arithmetic": _arithmetic(first.device),
    }
    if tier != TIERS[0]:
        found["convnext"] = tensors_sha256(body.vision_tower_aux)
    if tier == TOKENS:
        found["connector"] = sha256_of(connector_state(model))
        found["mines_natively"] = ARITHMETIC if body.mines_natively else False
        found["image_grid"] = [int(config.image_grid), bool(config.image_global)]
    return found


def _behaviour(config: Any) -> list[Any]:
    return [config.num_attention_heads, str(config.hidden_act), float(config.layer_norm_eps)]


def _arithmetic(device: torch.device) -> dict[str, Any]:
    common = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if device.type == "cuda":
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        return {
            **common,
            "device": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "cudnn": cudnn.version(),
            "benchmark": cudnn.benchmark,
            "precision": torch.get_float32_matmul_precision(),
            "tf32": [matmul.allow_tf32, cudnn.allow_tf32],
        }
    return {
        **common,
        "device": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
    }


def bytes_of_image(model: Any, tier: str, settings: Any, half: torch.dtype | None) -> int:
    """Bytes of an image's features, at most."""
    body, tower = model.model, model.model.vision_tower
    itemsize = 4 if half is not None else next(tower.parameters()).element_size()
    if tier == TOKENS:
        itemsize = body.mm_projector[0].weight.element_size()
    patches = tower.side**2
    return bytes_of_tier(
        tier,
        low=(patches * settings.n_views, tower.config.hidden_size),
        map_side=settings.image_size_aux // 4,
        map_widths=model.config.vision_aux_config["dims"],
        tokens=(patches * settings.n_views, model.config.hidden_size),
        itemsize=itemsize,
    )
