"""MGM: the LLM with two vision towers and patch info mining, its processor, checkpoints and adapters.

Names are loaded on first use: asking for `IMAGE_TOKEN_INDEX` must not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

IMAGE_TOKEN_INDEX = -200

_HOMES = {
    "MGMConfig": "configuration",
    "MGMGemmaConfig": "configuration",
    "MGMLlamaConfig": "configuration",
    "known_config": "configuration",
    "mgm_2b_config": "configuration",
    "KNOWN": "known",
    "MGMForConditionalGeneration": "mgm",
    "LossModule": "mgm",
    "LoadReport": "loading",
    "load_model": "loading",
    "build_model": "loading",
    "meta_model": "loading",
    "MGMProcessor": "processor",
    "load_processor": "processor",
    "processor_of": "processor",
    "ModelSource": "folders",
    "source_of_section": "folders",
    "Family": "family",
    "family_of": "family",
    "TrainableSet": "trainable",
    "set_trainable": "trainable",
    "assert_trainable": "trainable",
    "lora_targets": "trainable",
    "apply_adapter": "adapters",
    "adapter_state": "adapters",
    "connector_state": "adapters",
    "save_adapter": "adapters",
    "load_adapter": "adapters",
    "put_adapter": "adapters",
    "save_connector": "adapters",
    "load_connector": "adapters",
    "reset_connector": "adapters",
    "save_full": "adapters",
    "merge_run": "standalone",
    "check_merged": "check",
    "model_fingerprint": "fingerprint",
    "section_fingerprint": "fingerprint",
    "official_name": "tensors",
}
__all__ = ["IMAGE_TOKEN_INDEX", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
