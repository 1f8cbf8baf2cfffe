"""Files of adapters and models: safetensors written whole or not at all, and what an adapter folder consists of."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mgm_exp.errors import ModelError
from mgm_exp.model.folders import read_json
from mgm_exp.model.tensors import official_name, read_pickled

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
CONNECTOR_FILE = "non_lora_trainables.safetensors"
# Fields of PEFT's file that import the module that they name, or start another method than the kinds of this package.
_FOREIGN_FIELDS = (
    "megatron_config",
    "auto_mapping",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "velora_config",
    "monteclora_config",
    "arrow_config",
    "kasa_config",
    "use_bdlora",
    "use_qalora",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "modules_to_save",
)


def adapter_files(folder: Path) -> tuple[Path, Path | None]:
    """LoRA's tensors and the connector of an adapter folder, ours or one of the official code (pickled `.bin`).

    Raises:
        ModelError: it is no adapter folder.
    """
    weights = [folder / name for name in (ADAPTER_FILE, "adapter_model.bin") if (folder / name).is_file()]
    if not weights or not (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(f"{folder} is not an adapter folder: it needs adapter_config.json and {ADAPTER_FILE}.")
    connector = weights[0].with_name(CONNECTOR_FILE).with_suffix(weights[0].suffix)
    return weights[0], connector if connector.is_file() else None


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """PEFT's `adapter_config.json`.

    Raises:
        ModelError: damaged, or it asks PEFT for more than the kinds of this package do.
    """
    stated = read_json(folder / ADAPTER_CONFIG)
    asked = [field for field in _FOREIGN_FIELDS if stated.get(field)]
    if stated.get("init_lora_weights", True) not in (True, False, "gaussian"):
        asked.append(f"init_lora_weights={stated['init_lora_weights']}")  # a method that changes the base too
    if asked:
        raise ModelError(
            f"{folder / ADAPTER_CONFIG} sets {', '.join(asked)}, which none of the kinds here does.",
            advice="Use an adapter that was trained as one of the kinds of docs/adapters.md.",
        )
    return stated


def read_adapter(file: Path) -> dict[str, Tensor]:
    """An adapter's tensors by official name, as they are in its file.

    Raises:
        ModelError: a damaged file.
    """
    tensors = read_pickled(file) if file.suffix == ".bin" else read_safetensors(file)
    return {official_name(n): t for n, t in tensors.items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file whole or not at all (beside, fsync, rename)."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(
            {n: t.detach().cpu().contiguous() for n, t in tensors.items()}, str(beside), metadata={"format": "pt"}
        )
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file.

    Raises:
        ModelError: damaged.
    """
    try:
        return load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged or not a safetensors file: {error}") from error


def safetensors_names(path: Path) -> list[str]:
    """Names of a file's tensors, from its head.

    Raises:
        ModelError: damaged.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged or not a safetensors file: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Writes a text whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
