"""Which class is which kind of adapter, by configuration and by what a folder says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from typing import Any

from mgm_exp.config import AdaLoraConfig, AdapterConfig, AdapterInit, AdapterKind
from mgm_exp.errors import ConfigError, ModelError
from mgm_exp.model.adapters.base import Adapter

_HOMES = {
    AdapterKind.full: ("full", "Full"),
    AdapterKind.lora: ("lora", "Lora"),
    AdapterKind.adalora: ("adalora", "AdaLora"),
    AdapterKind.loha: ("loha", "LoHa"),
    AdapterKind.vera: ("vera", "Vera"),
    AdapterKind.prompt: ("prompt", "Prompt"),
    AdapterKind.prefix: ("prefix", "Prefix"),
    AdapterKind.bottleneck: ("bottleneck", "BottleneckAdapter"),
    AdapterKind.bitfit: ("bitfit", "BitFit"),
}


def adapter_class(kind: AdapterKind) -> type[Adapter]:
    home, name = _HOMES[kind]
    found: type[Adapter] = getattr(import_module(f"mgm_exp.model.adapters.{home}"), name)
    return found


def adapter_of(section: AdapterConfig | Mapping[str, Any]) -> Adapter:
    """The adapter that a configuration asks for.

    Args:
        section: `mgm_exp.config.AdapterConfig`, or a mapping with some of its keys.

    Raises:
        ConfigError: a kind or a key that does not exist.
    """
    config = section if isinstance(section, AdapterConfig) else _typed(section)
    return adapter_class(config.kind)(config)


def class_of_folder(stated: Mapping[str, Any], folder: Any) -> type[Adapter]:
    """The kind that an `adapter_config.json` describes.

    Raises:
        ModelError: one that is not known here.
    """
    said = str(stated.get("peft_type")).upper()
    known = {adapter_class(kind).peft_type: kind for kind in _HOMES if adapter_class(kind).peft_type}
    if said not in known:
        raise ModelError(
            f"{folder} holds a {stated.get('peft_type')} adapter; known are {', '.join(sorted(known))}.",
            advice="Only LoRA and the other kinds of conf/adapter can be applied.",
        )
    return adapter_class(known[said])


def _typed(section: Mapping[str, Any]) -> AdapterConfig:
    values = dict(section)
    allowed = {f.name for f in fields(AdapterConfig)}
    if unknown := sorted(set(values) - allowed):
        raise ConfigError(f"adapter has no key {', '.join(unknown)}; it has {', '.join(sorted(allowed))}.")
    kind = values.get("kind")
    try:
        values["kind"] = kind if isinstance(kind, AdapterKind) else AdapterKind(str(getattr(kind, "value", kind)))
        if "init" in values:
            values["init"] = AdapterInit(getattr(values["init"], "value", values["init"]))
    except ValueError as error:
        raise ConfigError(
            f"adapter.kind {kind!r} is not known: allowed are {', '.join(k.value for k in AdapterKind)} ({error})."
        ) from error
    if isinstance(values.get("adalora"), Mapping):
        values["adalora"] = AdaLoraConfig(**values["adalora"])
    return AdapterConfig(**{"name": str(values["kind"].value), **values})
