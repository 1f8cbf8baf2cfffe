"""Model folders that Data-Juicer is given: local, complete, safetensors only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mgm_exp.errors import ModelError
from mgm_exp.store import read_record

MAPPER_IMAGE_TOKEN = 50265
"""Data-Juicer's captioning mapper overwrites the model's image token with this one, that of BLIP-2 with OPT."""


def check_model_folder(what: str, folder: Path) -> dict[str, Any]:
    """Its ``config.json``.

    Args:
        what: Who wants it, for messages.
        folder: As a user gave it.

    Raises:
        ModelError: it is no local folder of a transformers model with safetensors weights, or it brings code.
    """
    advice = "Give a local folder in transformers' format: config.json, *.safetensors and the processor's files."
    if not folder.is_dir():
        raise ModelError(f"The model of {what} ({folder}) is no folder; nothing is downloaded.", advice=advice)
    try:
        config = read_record(folder / "config.json")
        architectures = config["architectures"]
    except FileNotFoundError:
        raise ModelError(f"The model folder of {what} ({folder}) has no config.json.", advice=advice) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{folder / 'config.json'} does not name the architecture of {what}.", advice=advice
        ) from error
    if not architectures or not isinstance(architectures, list):
        raise ModelError(f"{folder / 'config.json'} names no architecture.", advice=advice)
    if config.get("auto_map"):
        raise ModelError(
            f"The model of {what} ({folder}) brings code of its own (auto_map), which is not run.",
            advice="Use a model whose architecture transformers has.",
        )
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder} has no *.safetensors; pickled weights are not loaded.", advice=advice)
    return dict(config)


def check_mapper_model(folder: Path, prompt: str | None = None) -> None:
    """Checks a captioner for Data-Juicer's ``image_captioning_mapper``.

    Args:
        folder: As a user gave it.
        prompt: What its captions begin with.

    Raises:
        ModelError: it cannot be used, or is no BLIP-2 with OPT.
    """
    config = check_model_folder("image_captioning_mapper", folder)
    token = config.get("image_token_index", config.get("image_token_id"))
    if config["architectures"][0] != "Blip2ForConditionalGeneration" or token != MAPPER_IMAGE_TOKEN:
        raise ModelError(
            f"{folder} is a {config['architectures'][0]} with image token {token}. Data-Juicer's mapper sets the "
            f"image token to {MAPPER_IMAGE_TOKEN}, which only BLIP-2 with OPT has; others would describe nothing.",
            advice="Set data.captioner.engine=mgm_exp, which runs any image-text-to-text model.",
        )
    if prompt is not None and _query_tokens(folder) is None:
        raise ModelError(
            f"The processor in {folder} does not know num_query_tokens: with a prompt it would leave the image out.",
            advice="Set num_query_tokens in its processor_config.json, or leave data.captioner.prompt out.",
        )


def _query_tokens(folder: Path) -> Any:
    try:
        return read_record(folder / "processor_config.json").get("num_query_tokens")
    except (OSError, ValueError, AttributeError):
        return None
