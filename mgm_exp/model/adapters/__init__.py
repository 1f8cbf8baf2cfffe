"""Adapters: one file for each kind, and putting them in, saving, loading and merging them.

What a kind is stands in :mod:`mgm_exp.model.adapters.base`; what each is good for in docs/adapters.md.
"""

from __future__ import annotations

from mgm_exp.model.adapters.base import Adapter, Cost, MergedWeights
from mgm_exp.model.adapters.connector import (
    connector_state,
    load_connector,
    read_connector,
    reset_connector,
    save_connector,
)
from mgm_exp.model.adapters.files import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    CONNECTOR_FILE,
    adapter_files,
    read_adapter,
    read_adapter_config,
    read_safetensors,
    write_tensors,
)
from mgm_exp.model.adapters.kinds import adapter_class, adapter_of, class_of_folder
from mgm_exp.model.adapters.saving import (
    TOKENIZER_FILES,
    adapter_state,
    add_to_weights,
    apply_adapter,
    changes_base,
    has_adapter,
    installed,
    layout_of,
    load_adapter,
    merge_adapter,
    put_adapter,
    read_stated,
    save_adapter,
    save_full,
)

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_FILE",
    "CONNECTOR_FILE",
    "TOKENIZER_FILES",
    "Adapter",
    "Cost",
    "MergedWeights",
    "adapter_class",
    "adapter_files",
    "adapter_of",
    "adapter_state",
    "add_to_weights",
    "apply_adapter",
    "changes_base",
    "class_of_folder",
    "connector_state",
    "has_adapter",
    "installed",
    "layout_of",
    "load_adapter",
    "load_connector",
    "merge_adapter",
    "put_adapter",
    "read_adapter",
    "read_adapter_config",
    "read_connector",
    "read_safetensors",
    "read_stated",
    "reset_connector",
    "save_adapter",
    "save_connector",
    "save_full",
    "write_tensors",
]
