"""Tensors of model folders by their official names: where each one lies, and reading it.

safetensors are read lazily, one tensor at a time. Pickled files (`.bin`) are read only where a release has no other
form (towers, connector, shards of Vicuna), and only by torch's restricted unpickler, which builds tensors and nothing
else.
"""

from __future__ import annotations

import math
import pickle
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mgm_exp.errors import ModelError
from mgm_exp.model.folders import read_json
from mgm_exp.model.quantized import Packed, kind_of, logical_shape, roles, unpack

CLIP_PREFIX = "model.vision_tower.vision_tower.vision_model."
CONVNEXT_PREFIX = "model.vision_tower_aux."
CONNECTOR = re.compile(r"model\.(mm_projector\.[02]|vlm_uni_(?:query|aux|val)_projector\.[01])\.(?:weight|bias)")
_MAPPED_VALUES = 2**21
_WRAPPERS = re.compile(
    r"^(?:module\.|base_model\.model\.(?=model\.|lm_head\.|base_model\.|module\.)|_orig_mod\.|model\.(?=model\.|lm_head\.|base_model\.))"
)


def official_name(name: str) -> str:
    """A parameter's official name, whatever wrapped the model (DDP, PEFT, `LossModule`).

    A weight under LoRA keeps its own name (`.base_layer` is dropped), an adapter's tensor loses the adapter's name.
    """
    while found := _WRAPPERS.match(name):
        name = name[found.end() :]
    return name.replace(".base_layer.", ".").replace(".default.weight", ".weight").removesuffix(".default")


@dataclass(frozen=True)
class TensorPlace:
    """A tensor in a file; `shape` and `dtype` as stored. A weight of few bits has the shape that it is expanded to."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    packed: Packed | None = None


def tensor_map(folder: Path) -> dict[str, TensorPlace]:
    """All tensors of a folder, by the names in its files.

    Looks for `model.safetensors.index.json`, `pytorch_model.bin.index.json`, `*.safetensors`, then `*.bin`.

    Raises:
        ModelError: no weights, a missing or damaged file, or an index that points out of the folder.
    """
    files = _weight_files(folder)
    places: dict[str, TensorPlace] = {}
    for file in files:
        if file.suffix == ".bin":
            for key, tensor in read_pickled(file).items():
                places[key] = TensorPlace(file, key, tuple(tensor.shape), str(tensor.dtype))
            continue
        with _opened(file) as handle:
            for key in handle.keys():  # noqa: SIM118 - not a dict
                part = handle.get_slice(key)
                places[key] = TensorPlace(file, key, tuple(part.get_shape()), str(part.get_dtype()))
    return places


def with_packed(places: Mapping[str, TensorPlace]) -> dict[str, TensorPlace]:
    """The same tensors, with the several ones of a weight of few bits as one.

    Raises:
        ModelError: some of them are missing or damaged.
    """
    found = dict(places)
    for name, place in places.items():
        kind = kind_of(name, places)
        if kind is None:
            continue
        keys = roles(name, kind)
        if missing := [key for key in keys.values() if key not in places or places[key].file != place.file]:
            raise ModelError(f"{place.file} holds {name} as {kind}, but not {missing[0]}.", advice="Copy it again.")
        packed = Packed(kind, {role: places[key].key for role, key in keys.items()})
        for key in set(keys.values()) - {name}:
            found.pop(key)
        with _opened(place.file) as handle:
            found[name] = replace(place, shape=logical_shape(packed, place.shape, handle.get_tensor), packed=packed)
    return found


def _weight_files(folder: Path) -> list[Path]:
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            return _listed(folder, folder / index)
    for name in ("model.safetensors", "open_clip_model.safetensors"):
        if (folder / name).is_file():
            return [folder / name]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        files = [folder / n for n in ("open_clip_pytorch_model.bin", "pytorch_model.bin") if (folder / n).is_file()]
    if not files:
        raise ModelError(
            f"{folder} holds no weights: no model.safetensors(.index.json), no pytorch_model.bin(.index.json), no "
            "open_clip_pytorch_model.bin.",
            advice="The download is incomplete; fetch the files that end in .safetensors (or .bin).",
        )
    return files[:1] if files[0].suffix == ".bin" else files


def _listed(folder: Path, index: Path) -> list[Path]:
    """The shards that an index names; safetensors, or the pickles of older releases."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map.")
    names = sorted(set(map(str, weight_map.values())))
    outside = [n for n in names if Path(n).name != n]
    if outside:
        raise ModelError(f"{index} points outside its folder ({outside[0]!r}); only plain file names are allowed.")
    foreign = [n for n in names if Path(n).suffix not in (".safetensors", ".bin")]
    if foreign:
        raise ModelError(f"{index} names {foreign[0]!r}, which is neither a .safetensors nor a .bin file.")
    missing = [n for n in names if not (folder / n).is_file()]
    if missing:
        raise ModelError(
            f"{folder} lacks {', '.join(missing)}, which {index.name} lists.",
            advice="The download is incomplete; fetch the missing files.",
        )
    return [folder / n for n in names]


def _opened(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{file} is damaged or not a safetensors file: {error}", advice="Copy the file again."
        ) from error


# torch's unpickler is a stack machine in Python: a changed instruction finds its stack empty, or something else on it.
_DAMAGED = (
    *(RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError),
    *(ArithmeticError, MemoryError, struct.error),
)


def read_pickled(file: Path) -> dict[str, Tensor]:
    """A flat dict of tensors from a `.bin`, by the restricted unpickler.

    Raises:
        ModelError: damaged, or it holds anything but tensors.
    """
    try:
        with open(file, "rb") as opened:
            is_zip = opened.read(4) == b"PK\x03\x04"  # torch's form since 1.6: mapped, not read as a whole
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        # Of torch's words only the object's name: the rest says how to load the file all the same
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"holds objects other than tensors and was refused: {named[1]}" if named else "is no file of tensors"
        raise ModelError(
            f"{file} {why}.",
            advice="Use the file of the official release, or convert it to safetensors where it was made.",
        ) from error
    except _DAMAGED as error:
        raise ModelError(f"{file} is damaged: {error}", advice="Copy the file again.") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ModelError(f"{file} does not hold a dict of tensors.")
    return content


def read_tensors(places: Mapping[str, TensorPlace]) -> Iterator[tuple[str, Tensor]]:
    """Reads (name, tensor) file by file, one tensor in memory at a time.

    Raises:
        ModelError: a file is damaged.
    """
    by_file: dict[Path, list[tuple[str, str]]] = {}
    for name, place in places.items():
        by_file.setdefault(place.file, []).append((name, place.key))
    for file, entries in by_file.items():
        if file.suffix == ".bin":
            tensors = read_pickled(file)
            for name, key in entries:
                yield name, tensors[key]
            continue
        for part in _parts(entries, places):  # what was read of a mapped file stays resident until it is closed
            with _opened(file) as handle:
                for name, key in part:
                    packed = places[name].packed
                    yield name, handle.get_tensor(key) if packed is None else unpack(packed, handle.get_tensor)


def _parts(entries: list[tuple[str, str]], places: Mapping[str, TensorPlace]) -> Iterator[list[tuple[str, str]]]:
    """Neighbours whose tensors hold together about as many values as may be mapped at once; at least one each."""
    part: list[tuple[str, str]] = []
    count = 0
    for entry in entries:
        part.append(entry)
        count += math.prod(places[entry[0]].shape)
        if count >= _MAPPED_VALUES:
            yield part
            part, count = [], 0
    if part:
        yield part


def read_one(file: Path, key: str) -> Tensor:
    """A tensor of a safetensors file, as it is stored.

    Raises:
        ModelError: the file is damaged.
    """
    with _opened(file) as handle:
        return handle.get_tensor(key)


def convnext_shape(names: Mapping[str, TensorPlace]) -> dict[str, Any]:
    """`vision_aux_config` read from the tensors of a ConvNeXt tower; empty if there is none."""
    tower = {convnext_name(name): place for name, place in names.items()}
    tower.pop(None, None)
    dims: dict[int, int] = {}
    depths: dict[int, int] = {}
    for name, place in tower.items():
        found = re.fullmatch(rf"{re.escape(CONVNEXT_PREFIX)}vision_stages\.(\d+)\.blocks\.(\d+)\.gamma", str(name))
        if found:
            stage, block = int(found[1]), int(found[2])
            dims[stage] = place.shape[0]
            depths[stage] = max(depths.get(stage, 0), block + 1)
    if not dims or sorted(dims) != list(range(len(dims))):
        return {}
    return {"dims": [dims[i] for i in range(len(dims))], "depths": [depths[i] for i in range(len(dims))]}


def convnext_name(name: str) -> str | None:
    """Official name of an open_clip or official tensor of the ConvNeXt tower; None for everything else."""
    if name.startswith(CONVNEXT_PREFIX):
        return name
    for prefix in ("visual.trunk.", "trunk."):
        if name.startswith(prefix):
            name = name[len(prefix) :]
            if name.startswith(("stem.", "stages.")):
                return f"{CONVNEXT_PREFIX}vision_{name}"
            return None
    return CONVNEXT_PREFIX + name if name.startswith(("vision_stem.", "vision_stages.")) else None


def checkpoint_name(name: str) -> str:
    """Official name of a tensor of an MGM checkpoint: puts back CLIP's `vision_model.` level where a file lacks it."""
    outer = "model.vision_tower.vision_tower."
    return clip_name(name[len(outer) :]) or name if name.startswith(outer) else name


def clip_name(name: str) -> str | None:
    """Official name of a tensor of CLIP's vision half, with or without its `vision_model.` level; None else."""
    if name.startswith(CLIP_PREFIX):
        return name
    if name.startswith("vision_model."):
        name = name[len("vision_model.") :]
    if name.endswith("position_ids"):  # a buffer that old files hold
        return None
    known = ("embeddings.class_embedding", "embeddings.patch_", "embeddings.position_embedding")
    if name.startswith((*known, "pre_layrnorm.", "encoder.layers.", "post_layernorm.")):
        return CLIP_PREFIX + name
    return None
