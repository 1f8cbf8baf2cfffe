"""Model folders from outside: what they hold, and loading them from safetensors only, whole or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgm_exp.errors import MissingDependencyError, ModelError
from mgm_exp.store import read_record

if TYPE_CHECKING:
    import torch

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def model_type(folder: Path, what: str) -> str:
    """The `model_type` of a folder that holds `config.json` and safetensors.

    Args:
        folder: as given by the user.
        what: what it is to be, for messages: "captioner", "scorer".

    Raises:
        ModelError: a file is missing, or `config.json` cannot be read.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(
            f"The {what} folder {folder} has no config.json.",
            advice="Give a local model folder in transformers format (config.json, safetensors, processor files).",
        )
    try:
        kind = read_record(config)["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{config} does not say what model it describes ({error!r}).") from error
    return str(kind)


def check_weights(folder: Path, what: str) -> None:
    """Raises a ModelError unless the folder has safetensors."""
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"The {what} folder {folder} has no *.safetensors.",
            advice="Convert the weights to safetensors first; pickled weights are not opened.",
        )


def load(model_class: Any, folder: Path, what: str, *, device: str, precision: str = "auto") -> tuple[Any, Any]:
    """Model, in evaluation mode, and processor of a folder; nothing is fetched, and no code of the folder is run.

    Args:
        model_class: of transformers.
        folder: checked by :func:`check_weights`.
        what: for messages.
        device: "cpu", "cuda", "cuda:1", ...
        precision: auto (bf16 on a GPU, fp32 on the CPU), fp32, bf16, fp16 or int8.

    Raises:
        ModelError: the folder cannot be loaded, or lacks weights that the model needs.
        MissingDependencyError: int8 without a GPU or without bitsandbytes.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoProcessor

    options = {"local_files_only": True, "trust_remote_code": False}
    with _quiet_loading():
        try:
            processor = AutoProcessor.from_pretrained(str(folder), **options)
            model, loaded = model_class.from_pretrained(
                str(folder),
                use_safetensors=True,
                output_loading_info=True,
                **options,
                **_arithmetic(device, precision),
            )
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            raise ModelError(
                f"The {what} folder {folder} cannot be loaded: {type(error).__name__}: {str(error)[:400]}",
                advice="Copy the folder again, with its processor files; models that bring code are not run.",
            ) from error
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise ModelError(
            f"The {what} folder {folder} lacks {len(missing)} tensors of {type(model).__name__} ({missing[0]}, ...): "
            "random weights would take their place.",
            advice=f"Give the folder of a model that was made for a {what}, or copy it again.",
        )
    if precision != "int8":
        model.to(torch.device(device))
    return model.eval(), processor


def fingerprint(folder: Path) -> str:
    """SHA-256 over the folder's config and safetensors files."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def compute_type(device: str, precision: str) -> torch.dtype:
    """The type of activations. int8 weights compute in fp16."""
    import torch

    if precision == "auto":
        precision = "fp32" if device == "cpu" else "bf16"
    return torch.float16 if precision == "int8" else getattr(torch, PRECISIONS[precision])


def _arithmetic(device: str, precision: str) -> dict[str, Any]:
    if precision != "int8":
        return {"dtype": compute_type(device, precision)}
    import importlib.util

    if not device.startswith("cuda") or importlib.util.find_spec("bitsandbytes") is None:
        lacking = "bitsandbytes" if device.startswith("cuda") else "a GPU"
        raise MissingDependencyError(
            f"data.captioner.precision=int8 needs {lacking}, which is not there; allowed here: auto, fp32, bf16, fp16.",
            advice="pip install 'mgm-exp[cuda]' on a machine with a GPU, or take another precision.",
        )
    from transformers import BitsAndBytesConfig

    return {
        "dtype": compute_type(device, precision),
        "quantization_config": BitsAndBytesConfig(load_in_8bit=True),
        "device_map": {"": device},
    }


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """transformers draws a bar and a table of tensors for every loaded model, across the run's own progress."""
    from transformers.utils import logging

    was_on, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if was_on:
            logging.enable_progress_bar()
