"""A run's adapter as a folder of its own in PEFT's form, with projector and mining beside it, and the proof of it.

An adapter folder of the official code (pickled ``adapter_model.bin``, ``non_lora_trainables.bin``) is converted by it:
the result holds safetensors, and names the layers that it changes one by one, where the official suffixes would hit
CLIP's attention too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mgm_exp.errors import ModelError
from mgm_exp.model.adapters import (
    ADAPTER_FILE,
    CONNECTOR_FILE,
    adapter_files,
    read_adapter,
    read_connector,
    read_safetensors,
    write_tensors,
)
from mgm_exp.model.adapters.base import PEFT_PREFIX
from mgm_exp.model.card import model_card
from mgm_exp.model.finding import Finding, some
from mgm_exp.model.folders import ModelSource, read_json
from mgm_exp.model.merged_tensors import MergedTensors
from mgm_exp.store import write_atomic, write_json_atomic

FILES = ("adapter_config.json", ADAPTER_FILE, CONNECTOR_FILE)


def write_adapter(source: ModelSource, folder: Path, base_name: str) -> tuple[int, int]:
    """Writes PEFT's two files and the connector's.

    Args:
        source: With an adapter.
        folder: Gets the files.
        base_name: Portable name of the base.

    Returns:
        Tensors and bytes that were written.

    Raises:
        ModelError: there is no adapter, or it does not fit its base.
    """
    if source.adapter is None:
        raise ModelError(
            "This run trained the whole model, so it has no adapter to export.", advice="Use --export safetensors."
        )
    weights, connector = adapter_files(source.adapter)
    lora, rest = read_adapter(weights), read_connector(connector) if connector is not None else {}
    stated = read_json(source.adapter / "adapter_config.json")
    stated["base_model_name_or_path"] = base_name
    if weights.suffix == ".bin":
        stated["target_modules"] = sorted({name.rsplit(".lora_", 1)[0] for name in lora})
        stated.setdefault("task_type", "CAUSAL_LM")
        write_tensors(folder / ADAPTER_FILE, {PEFT_PREFIX + name: tensor for name, tensor in lora.items()})
    else:
        write_tensors(folder / ADAPTER_FILE, read_safetensors(weights))  # under the names that its kind has for PEFT
    if rest:
        write_tensors(folder / CONNECTOR_FILE, {PEFT_PREFIX + name: tensor for name, tensor in rest.items()})
    write_json_atomic(folder / "adapter_config.json", stated)
    tensors = [*lora.values(), *rest.values()]
    return len(tensors), sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def write_card(
    facts: Mapping[str, Mapping[str, Any]],
    base_name: str,
    base: Path,
    merged: MergedTensors,
    license_name: str | None,
    folder: Path,
) -> None:
    """README.md of an adapter: as a merged model's, but for what it is and how it is loaded."""
    card = model_card(facts, base_name, base, merged, license_name)
    card = card.replace("library_name: mgm_exp", "library_name: peft")
    start, end = card.index("MGM (Mini-Gemini) with"), card.index("## How it was made")
    says = (
        f"An adapter for {base_name} with the trained projector and patch info mining beside it "
        f"(`{CONNECTOR_FILE}`).\n\n"
        "```python\nfrom mgm_exp.model import load_adapter, load_model\n\n"
        'model = load_adapter(load_model("BASE"), "FOLDER")\n```\n\n'
        f"`PeftModel.from_pretrained` reads the adapter alone; projector and mining then stay the base's.\n\n"
    )
    write_atomic(folder / "README.md", card[:start] + says + card[end:].replace(", merged (scale", " (scale"))


def check_adapter(
    folder: Path, source: ModelSource, logits: Callable[[ModelSource], list[Tensor]] | None
) -> list[Finding]:
    """Whether an exported adapter holds what the run's does, fits the base, and answers the same.

    Args:
        folder: The export.
        source: Base and adapter of the run.
        logits: Answers of base and adapter to a few questions; None: they are not compared.
    """
    there = source.adapter or folder
    findings = []
    try:
        mine, theirs = (_tensors(place) for place in (folder, there))
    except ModelError as error:
        return [Finding("adapter can be read", False, str(error))]
    wrong = [f"{name} is missing" for name in sorted(set(theirs) - set(mine))]
    wrong += [f"{name} is one too many" for name in sorted(set(mine) - set(theirs))]
    shared = sorted(set(mine) & set(theirs))
    wrong += [f"{name} is another" for name in shared if not _is_same(mine[name], theirs[name])]
    findings.append(Finding("tensors are the run's", not wrong, some(wrong) or f"{len(mine)} tensors"))
    infinite = [name for name in sorted(mine) if not torch.isfinite(mine[name].float()).all()]
    findings.append(Finding("values are finite", not infinite, some(infinite) or f"{len(mine)} tensors"))
    exported = replace(source, adapter=folder)
    try:
        fits = MergedTensors(exported)
        findings.append(Finding("fits its base", True, f"{len(fits.adapted)} weights (scale {fits.scale:g})"))
        if logits is None:
            return [*findings, Finding("logits of both adapters", None, "left out with --no-logits")]
        here, wanted = logits(exported), logits(source)
    except ModelError as error:
        return [*findings, Finding("fits its base", False, str(error))]
    largest = max(
        float((a - b).abs().max()) if a.shape == b.shape else math.inf for a, b in zip(here, wanted, strict=True)
    )
    return [*findings, Finding("logits of both adapters", largest == 0, f"differ by at most {largest:.2g}; allowed 0")]


def _tensors(folder: Path) -> dict[str, Tensor]:
    weights, connector = adapter_files(folder)
    return {**read_adapter(weights), **(read_connector(connector) if connector is not None else {})}


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
