"""What can be found wrong with a folder before hours are spent on it; reads no weights."""

from __future__ import annotations

from pathlib import Path

from mgm_exp.config import AdapterKind, ExperimentConfig
from mgm_exp.errors import ConfigError, ModelError
from mgm_exp.model.hf.loading import meta_model, open_processor
from mgm_exp.model.hf.parts import Parts, parts_of


def check_hf(config: ExperimentConfig, folder: Path) -> list[str]:
    """Looks at type, files, processor, chat template and the layers that are to be trained.

    Returns:
        Sentences for the log.

    Raises:
        ModelError, ConfigError, MissingDependencyError: what is missing, and what to do.
    """
    parts = parts_in(folder)
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder} holds no safetensors file.",
            advice="Pickled weights (.bin) are never loaded; save the model again with transformers.",
        )
    if config.adapter.kind is not AdapterKind.full:
        parts.targets(config.adapter.target_modules)
    if config.model.train_connector and not parts.connectors:
        raise ConfigError("model.train_connector=true, but no connector is known in this model; give false.")
    processor = open_processor(folder, config.train.max_length)
    counts = parts.counts()
    said = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)
    return [f"{type(processor.processor).__name__}, {type(processor.dialect).__name__}; parameters: {said}"]


def parts_in(folder: Path) -> Parts:
    """The parts of the model that ``config.json`` of a folder describes.

    Raises:
        ModelError: it is no image-text-to-text model of transformers, or has no language model of its own.
    """
    return parts_of(meta_model(folder))
