"""What a run of a model of transformers leaves: a PEFT adapter folder, or a folder that transformers loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from mgm_exp.errors import ModelError
from mgm_exp.model.hf.loading import without_bars
from mgm_exp.model.hf.trainable import adapter_parameters
from mgm_exp.model.tensors import official_name
from mgm_exp.store import write_atomic

ADAPTER_FILE = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
_OF_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".msgpack",
    ".h5",
    ".onnx",
    ".py",
    ".index.json",
)
_OWN = ("config.json", "adapter_config.json", "README.md", "merge.json")


def save_hf_adapter(model: Any, folder: Path) -> None:
    """Writes `adapter_model.safetensors` and `adapter_config.json`, as `PeftModel.from_pretrained` reads them."""
    from mgm_exp.model.adapters import write_tensors

    folder.mkdir(parents=True, exist_ok=True)
    state = {PEFT_PREFIX + name: parameter for name, parameter in adapter_parameters(model).items()}
    if not state:
        raise ModelError("The model has no adapter to save.")
    config = dict(model.peft_config["default"].to_dict())
    config["base_model_name_or_path"] = Path(getattr(model, "source_folder", "") or "base").name
    config["inference_mode"] = True
    config = {k: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for k, v in config.items()}
    write_tensors(folder / ADAPTER_FILE, state)
    write_atomic(folder / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_hf_adapter(model: Any, folder: Path) -> None:
    """Applies a saved adapter to its base model, in place.

    Raises:
        ModelError: no adapter folder, a damaged file, or one of another model.
    """
    from peft import inject_adapter_in_model

    from mgm_exp.model.adapters.base import peft_config

    stated, stored = _read(folder)
    inject_adapter_in_model(peft_config(stated), model)
    parameters = adapter_parameters(model)
    wrong = sorted(set(stored) ^ set(parameters))
    wrong += sorted(n for n in set(stored) & set(parameters) if stored[n].shape != parameters[n].shape)
    if wrong:
        raise ModelError(
            f"The adapter in {folder} does not fit this model: {len(wrong)} tensors differ, first {wrong[0]!r}.",
            advice="It was made for another base model.",
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.data = stored[name].to(parameter.device)
    model.eval()


def merge_hf_adapter(model: Any, folder: Path) -> None:
    """Adds a saved adapter to the weights of its base model; those of the base stay as they are.

    Raises:
        ModelError: no adapter folder, a damaged file, or one of another model.
    """
    from mgm_exp.model.adapters import add_to_weights
    from mgm_exp.model.adapters.lora import Lora

    add_to_weights(model, Lora, *_read(folder))
    model.eval()


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What an adapter folder says of itself, and its tensors by name."""
    from mgm_exp.model.adapters import read_adapter_config, read_safetensors

    if not (folder / ADAPTER_FILE).is_file() or not (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder} is not an adapter folder: it needs adapter_config.json and {ADAPTER_FILE}.")
    stated = read_adapter_config(folder)
    if stated.get("peft_type") != "LORA":
        raise ModelError(f"{folder / 'adapter_config.json'} is no LoRA configuration: {stated.get('peft_type')}.")
    return stated, {official_name(name): tensor for name, tensor in read_safetensors(folder / ADAPTER_FILE).items()}


def save_hf_model(model: Any, folder: Path) -> None:
    """Writes a whole model, with processor and generation settings of its base: `from_pretrained` loads it."""
    folder.mkdir(parents=True, exist_ok=True)
    with without_bars():
        model.save_pretrained(str(folder))
    copy_companions(Path(model.source_folder), folder)


def copy_companions(base: Path, folder: Path) -> None:
    """Copies what belongs to a model besides its weights: tokenizer, processor, generation settings, licence."""
    for path in sorted(base.iterdir()):
        is_companion = path.is_file() and path.name not in _OWN and not path.name.startswith(".")
        target = folder / path.name
        if is_companion and not path.name.endswith(_OF_WEIGHTS) and path.resolve() != target.resolve():
            shutil.copyfile(path, target)
