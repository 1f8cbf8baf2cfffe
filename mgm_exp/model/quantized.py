"""Weights of 8 and 4 bits in the form of bitsandbytes: made on a GPU, read anywhere.

The LLM's linear layers are stored as bitsandbytes and transformers store them: LLM.int8 (Dettmers et al., arXiv
2208.07339) as rows of int8 with the largest absolute value of each row, NF4 (Dettmers et al., arXiv 2305.14314) as two
codes a byte with the largest absolute value of each block. Towers, projector, mining, embeddings and norms keep their
16 or 32 bits. Making such weights takes bitsandbytes and a CUDA GPU; reading them back takes neither.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from mgm_exp.errors import MissingDependencyError, ModelError

KINDS = ("int8", "nf4")
BLOCK = 64
"""Weights that share one scale in NF4."""
_LINEAR = re.compile(r"model\.layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)\.weight")
_STATE = ".quant_state.bitsandbytes__nf4"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Packed:
    """How a weight is stored in few bits.

    Args:
        kind: One of :data:`KINDS`.
        keys: Names of its tensors in the file: role -> key.
    """

    kind: str
    keys: Mapping[str, str]


def is_packed(name: str) -> bool:
    """Whether the weight of this name is stored in few bits."""
    return _LINEAR.fullmatch(name) is not None


def roles(name: str, kind: str) -> dict[str, str]:
    """Names of the tensors that a weight becomes."""
    if kind == "int8":
        stem = name.removesuffix(".weight")
        return {"codes": name, "scale": f"{stem}.SCB", "format": f"{stem}.weight_format"}
    return {"codes": name, "absmax": f"{name}.absmax", "map": f"{name}.quant_map", "state": name + _STATE}


def kind_of(name: str, keys: Mapping[str, Any]) -> str | None:
    """In how few bits a file with these keys holds a weight; None: as it is."""
    if name + _STATE in keys:
        return "nf4"
    return "int8" if name.endswith(".weight") and f"{name.removesuffix('.weight')}.SCB" in keys else None


def settings(kind: str, dtype: str) -> dict[str, Any]:
    """``quantization_config`` of config.json, as transformers writes it."""
    if kind == "int8":
        return {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False, "llm_int8_threshold": 0.0}
    return {
        "quant_method": "bitsandbytes",
        "load_in_8bit": False,
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": dtype,
    }


def packer(kind: str, device: str | None = None) -> Callable[[str, Tensor], dict[str, Tensor]]:
    """What turns a weight into its tensors of few bits, by name.

    Args:
        kind: One of :data:`KINDS`.
        device: Where bitsandbytes computes; None: the first CUDA GPU.

    Raises:
        MissingDependencyError: there is no usable GPU, or no bitsandbytes.
    """
    has_gpu, has_package = torch.cuda.is_available(), find_spec("bitsandbytes") is not None
    if not has_package or (device is None and not has_gpu):
        lacking = [] if has_gpu or device is not None else [f"a CUDA GPU (torch {torch.__version__} sees none)"]
        lacking += [] if has_package else ["the package bitsandbytes"]
        raise MissingDependencyError(
            f"--export {kind} is made by bitsandbytes on a GPU; missing here: {' and '.join(lacking)}.",
            advice="Run it on a machine with an NVIDIA GPU after pip install 'mgm-exp[cuda]', or leave --export out.",
        )
    import bitsandbytes.functional as bnb

    place = device or "cuda"

    def pack(name: str, weight: Tensor) -> dict[str, Tensor]:
        names = roles(name, kind)
        if kind == "int8":
            codes, scale, _ = bnb.int8_vectorwise_quant(weight.to(place, torch.float16))
            found = {"codes": codes, "scale": scale, "format": torch.zeros((), dtype=torch.uint8)}
        else:
            codes, state = bnb.quantize_4bit(weight.to(place), blocksize=BLOCK, quant_type="nf4")
            packed = state.as_dict(packed=True)
            found = {"codes": codes, "absmax": packed["absmax"], "map": packed["quant_map"]}
            found["state"] = packed[_STATE.removeprefix(".")]
        return {names[role]: tensor.cpu().contiguous() for role, tensor in found.items()}

    return pack


def logical_shape(packed: Packed, stored: tuple[int, ...], read: Callable[[str], Tensor]) -> tuple[int, ...]:
    """Shape of a weight whose codes have the shape ``stored``; ``read`` gives a tensor of its file.

    Raises:
        ModelError: the description of the codes is damaged.
    """
    return stored if packed.kind == "int8" else tuple(_state(packed, read)["shape"])


def unpack(packed: Packed, read: Callable[[str], Tensor]) -> Tensor:
    """A weight out of its codes, in the dtype that it had (int8: fp32).

    Raises:
        ModelError: the codes are damaged.
    """
    codes = read(packed.keys["codes"])
    if packed.kind == "int8":
        scale = read(packed.keys["scale"]).float()
        if codes.dtype != torch.int8 or scale.shape != codes.shape[:1]:
            raise ModelError(f"{packed.keys['codes']}: codes and scales of int8 do not belong together.")
        return codes.float() * (scale / 127.0)[:, None]
    state = _state(packed, read)
    absmax, table = read(packed.keys["absmax"]).float(), read(packed.keys["map"]).float()
    count = 1
    for side in state["shape"]:
        count *= side
    if codes.numel() != -(-count // 2) or absmax.numel() != -(-count // state["blocksize"]) or table.numel() != 16:
        raise ModelError(f"{packed.keys['codes']}: codes and scales of nf4 do not belong together.")
    flat = codes.flatten().long()
    values = table[torch.stack([flat >> 4, flat & 15], 1).flatten()[:count]]  # the first of two is the upper half
    scales = absmax.repeat_interleave(state["blocksize"])[:count]
    return (values * scales).reshape(state["shape"]).to(_DTYPES[state["dtype"]])


def agrees(weight: Tensor, wanted: Tensor, kind: str) -> bool:
    """Whether an unpacked weight is as near to the wanted one as its format can be, everywhere.

    Half the widest gap between two codes (0.152 of a block's largest value in NF4, 1/254 of a row's in int8), and what
    is lost by 16 bits.
    """
    values, true = weight.float(), wanted.float()
    if kind == "int8":
        room = true.abs().amax(1, keepdim=True) / 254
    else:
        padded = nn.functional.pad(true.abs().flatten(), (0, -true.numel() % BLOCK)).reshape(-1, BLOCK)
        room = 0.1525 * padded.amax(1).repeat_interleave(BLOCK)[: true.numel()].reshape(true.shape)
    return bool(((values - true).abs() <= 1.01 * room + 2**-7 * true.abs() + 1e-7).all())


def keep_packed(model: nn.Module, places: Mapping[str, Packed], read: Callable[[str, str], Tensor]) -> None:
    """Puts bitsandbytes' own layers in place of the expanded ones, so that the weights stay small on the GPU.

    Args:
        model: On its device, with expanded weights.
        places: Weights by name.
        read: (name of the weight, key in its file) -> tensor.
    """
    import bitsandbytes as bnb

    for name, packed in places.items():
        parent_name, _, child = name.removesuffix(".weight").rpartition(".")
        parent = model.get_submodule(parent_name)
        old: Any = getattr(parent, child)
        device, dtype = old.weight.device, old.weight.dtype
        found = {role: read(name, key) for role, key in packed.keys.items()}
        layer: Any
        if packed.kind == "int8":
            layer = bnb.nn.Linear8bitLt(old.in_features, old.out_features, bias=False, has_fp16_weights=False)
            codes, scale = found["codes"].to(device), found["scale"].to(device)
            layer.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scale)
        else:
            layer = bnb.nn.Linear4bit(
                old.in_features, old.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
            )
            stats = {"absmax": found["absmax"], "quant_map": found["map"], _STATE.removeprefix("."): found["state"]}
            layer.weight = bnb.nn.Params4bit.from_prequantized(
                found["codes"], stats, requires_grad=False, device=device, module=layer
            )
        layer.requires_grad_(False)
        setattr(parent, child, layer.eval())


def _state(packed: Packed, read: Callable[[str], Tensor]) -> dict[str, Any]:
    """bitsandbytes' description of NF4 codes: JSON as bytes."""
    try:
        state = json.loads(bytes(read(packed.keys["state"]).tolist()))
        is_right = state["quant_type"] == "nf4" and state["dtype"] in _DTYPES
        is_right = is_right and all(
            isinstance(side, int) and side > 0 for side in [*state["shape"], state["blocksize"]]
        )
        is_right = is_right and state["blocksize"] <= 4096  # bitsandbytes' largest
        if is_right and "nested_blocksize" not in state:
            return dict(state)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{packed.keys['state']} is damaged: {error}") from error
    raise ModelError(f"{packed.keys['state']} describes no NF4 without double quantisation, which alone is read.")
