"""LoRA on the LLM by PEFT, and saving and loading what a stage trained.

The adapter is put into the model in place: the model keeps its class and its names. On disk it has PEFT's own form,
so that `PeftModel.from_pretrained(load_model(base), folder)` works; the connector lies beside it under the official
names of `non_lora_trainables`, always whole, also where a stage kept it frozen.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mgm_exp.errors import ModelError
from mgm_exp.model.folders import read_json
from mgm_exp.model.loading import connector_start, seeded_uniform
from mgm_exp.model.mgm import MGMForConditionalGeneration
from mgm_exp.model.tensors import CONNECTOR, official_name, read_pickled
from mgm_exp.model.trainable import connector_names, lora_names, lora_targets

ADAPTER_FILE = "adapter_model.safetensors"
CONNECTOR_FILE = "non_lora_trainables.safetensors"
# Fields of PEFT's file that import a module (megatron_core) or start another method than plain LoRA.
_OTHER_METHODS = (
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
PEFT_PREFIX = "base_model.model."
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "preprocessor_config.json",
)


def apply_adapter(model: MGMForConditionalGeneration, adapter: Any, seed: int) -> MGMForConditionalGeneration:
    """Puts the adapter of a config into the model (nothing for `kind=full`).

    B starts at zero and A at U(-1/sqrt(in), 1/sqrt(in)), PEFT's own start (Hu et al., arXiv 2106.09685), but drawn
    from the seed and the tensor's name: the same on any device and for any set of targets. Adapter weights are fp32.

    Args:
        model: without an adapter.
        adapter: `mgm_exp.config.AdapterConfig` or a mapping with `kind, rank, alpha, dropout, target_modules`.
        seed: of A.

    Returns:
        The same object.
    """
    from peft import LoraConfig, inject_adapter_in_model

    section = adapter if isinstance(adapter, Mapping) else vars(adapter)
    if str(getattr(section["kind"], "value", section["kind"])) == "full":
        return model
    if has_adapter(model):
        raise ModelError("The model has an adapter already.", advice="Merge it, or start from the base model.")
    modules = list(section["target_modules"])
    config = LoraConfig(
        r=int(section["rank"]),
        lora_alpha=section["alpha"],
        lora_dropout=float(section["dropout"]),
        target_modules=lora_targets(modules),
        bias="none",
        task_type="CAUSAL_LM",
    )
    inject_adapter_in_model(config, model)
    model.train(model.training)  # new layers come in training mode, whatever the model is in
    found = _adapter_parameters(model)
    if (wanted := lora_names(model.config, modules)) != set(found):
        raise ModelError(f"LoRA was put on other layers than declared: {sorted(wanted ^ set(found))[:3]}.")
    with torch.no_grad():
        for name, parameter in found.items():
            parameter.data = parameter.data.float()
            if ".lora_A." in name:
                bound = 1 / math.sqrt(parameter.shape[1])
                parameter.copy_(seeded_uniform(tuple(parameter.shape), bound, seed, name))
            else:
                parameter.zero_()
    return model


def has_adapter(model: nn.Module) -> bool:
    return any(".lora_A." in name for name, _ in model.named_parameters())


def connector_state(model: nn.Module) -> dict[str, Tensor]:
    """Projector and mining by official name, on the CPU."""
    return {n: t.detach().cpu().contiguous() for n, t in _official(model).items() if CONNECTOR.fullmatch(n)}


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """LoRA's tensors by official name (`model.layers.0.self_attn.q_proj.lora_A.weight`), on the CPU."""
    return {n: t.detach().cpu().contiguous() for n, t in _adapter_parameters(model).items()}


def save_adapter(
    model: MGMForConditionalGeneration,
    folder: str | Path,
    *,
    base_name: str | None = None,
    adapter: Mapping[str, Tensor] | None = None,
    connector: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes `adapter_model.safetensors` and `adapter_config.json` (PEFT) and `non_lora_trainables.safetensors`.

    Args:
        model: with an adapter.
        folder: made if it is not there; its files are replaced one by one, each whole.
        base_name: portable name of the base in `adapter_config.json`; None: the base folder's last component.
        adapter, connector: tensors by official name where the model's own are sharded; None: the model's.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = dict(adapter if adapter is not None else adapter_state(model))
    if not state:
        raise ModelError("The model has no adapter to save.", advice="A full fine-tuning is saved with save_full.")
    config = dict(model.peft_config["default"].to_dict())
    config["base_model_name_or_path"] = base_name or Path(getattr(model, "source_folder", "") or "mgm").name
    config["inference_mode"] = True
    config = {k: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for k, v in config.items()}
    write_tensors(folder / ADAPTER_FILE, {PEFT_PREFIX + n: t for n, t in state.items()})
    _write_text(folder / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    trained = connector if connector is not None else connector_state(model)
    write_tensors(folder / CONNECTOR_FILE, {PEFT_PREFIX + n: t for n, t in trained.items()})


def load_adapter(model: MGMForConditionalGeneration, folder: str | Path) -> MGMForConditionalGeneration:
    """Applies a saved adapter, and the connector beside it, to its base model.

    Raises:
        ModelError: no PEFT LoRA folder, tensors for other layers or of another size, a damaged file.
    """
    from peft import LoraConfig, inject_adapter_in_model

    folder = Path(folder)
    weights, connector = adapter_files(folder)
    _refuse_other_methods(folder / "adapter_config.json")
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{folder / 'adapter_config.json'} is not a PEFT config: {error}") from error
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        raise ModelError(f"{folder} holds a {config.peft_type} adapter; only LoRA can be applied.")
    config.inference_mode = True
    tensors = read_adapter(weights)
    if weights.suffix == ".bin":  # suffixes, which hit CLIP too: the official code added LoRA before the towers
        config.target_modules = sorted({n.rsplit(".lora_", 1)[0] for n in tensors})
    inject_adapter_in_model(config, model)
    model.train(model.training)  # new layers come in training mode: their dropout would be active in an eval model
    put_adapter(model, tensors)
    if connector is not None:
        load_connector(model, connector)
    model.requires_grad_(False)
    return model


def _refuse_other_methods(file: Path) -> None:
    """Plain LoRA only: other methods of PEFT import the module, or start the computation, that the file names.

    Raises:
        ModelError: naming the field.
    """
    fields = read_json(file)
    asked = [name for name in _OTHER_METHODS if fields.get(name)]
    if not isinstance(fields.get("init_lora_weights", True), bool):
        asked.append("init_lora_weights")
    if asked:
        raise ModelError(
            f"{file} sets {', '.join(asked)}, which plain LoRA does not; only plain LoRA is applied.",
            advice="Use an adapter that was trained as plain LoRA.",
        )


def adapter_files(folder: Path) -> tuple[Path, Path | None]:
    """LoRA's tensors and the connector of an adapter folder, ours or one of the official code (pickled `.bin`).

    Raises:
        ModelError: it is no adapter folder.
    """
    weights = [folder / name for name in (ADAPTER_FILE, "adapter_model.bin") if (folder / name).is_file()]
    if not weights or not (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder} is not an adapter folder: it needs adapter_config.json and {ADAPTER_FILE}.")
    connector = weights[0].with_name(CONNECTOR_FILE).with_suffix(weights[0].suffix)
    return weights[0], connector if connector.is_file() else None


def read_adapter(file: Path) -> dict[str, Tensor]:
    """LoRA's tensors by official name.

    Raises:
        ModelError: a damaged file.
    """
    tensors = read_pickled(file) if file.suffix == ".bin" else read_safetensors(file)
    return {official_name(n): t for n, t in tensors.items()}


def read_connector(file: Path) -> dict[str, Tensor]:
    """Projector and mining by official name, of our safetensors or the official pickles.

    Raises:
        ModelError: a damaged file, or trained towers, which this package does not have.
    """
    tensors = read_pickled(file) if file.suffix == ".bin" else read_safetensors(file)
    named = {official_name(n): t for n, t in tensors.items()}
    if foreign := sorted(n for n in named if not CONNECTOR.fullmatch(n)):
        raise ModelError(
            f"{file} holds {len(foreign)} tensors besides projector and mining, first {foreign[0]!r}.",
            advice="Runs that train the towers as well are not supported.",
        )
    return named


def put_adapter(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies adapter tensors by official name; the names must be exactly the model's."""
    parameters = _adapter_parameters(model)
    _copy_exactly(parameters, tensors, "adapter", widen=True)


def save_connector(model: nn.Module, path: str | Path, connector: Mapping[str, Tensor] | None = None) -> None:
    """Writes projector and mining under their official names (`model.mm_projector.0.weight`, ...)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, connector if connector is not None else connector_state(model))


def load_connector(model: nn.Module, path: str | Path) -> None:
    """Reads projector and mining from our safetensors, or from the official `mm_projector.bin`.

    Raises:
        ModelError: missing or foreign tensors, another size, a damaged file.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"Connector file {str(path)!r} does not exist.")
    tensors = read_pickled(path) if path.suffix == ".bin" else read_safetensors(path)
    named = {official_name(n): t for n, t in tensors.items()}
    # The official mm_projector.bin holds both towers beside the connector
    named = {n: t for n, t in named.items() if not n.startswith(("model.vision_tower.", "model.vision_tower_aux."))}
    wanted = {n: p for n, p in _official(model).items() if CONNECTOR.fullmatch(n)}
    _copy_exactly(wanted, named, f"connector {path.name}")


def reset_connector(model: nn.Module, part: str, seed: int) -> list[str]:
    """Starts part of the connector from new seeded values; returns the names.

    Args:
        part: "none", "projector" (mm_projector) or "connector" (projector and mining).
    """
    if part not in ("none", "projector", "connector"):
        raise ModelError(f"Connector part {part!r} is not known: allowed are none, projector, connector.")
    names = sorted(n for n in connector_names() if part == "connector" or "mm_projector" in n) if part != "none" else []
    parameters = _official(model)
    shapes = {n: tuple(parameters[n].shape) for n in connector_names()}
    with torch.no_grad():
        for name in names:
            parameters[name].copy_(connector_start(name, shapes, seed))
    return names


def save_full(
    model: MGMForConditionalGeneration, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Writes a complete model folder: official names, both towers, config.json and the tokenizer of its base.

    Args:
        state_dict: all tensors by official name where the model's own are sharded; None: the model's.

    Raises:
        ModelError: the model has an adapter (merge it first).
    """
    if has_adapter(model):
        raise ModelError("A model with an adapter is saved with save_adapter, or merged first.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(state_dict) if state_dict is not None else dict(_official(model))  # a tied head appears once
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(str(folder))
    model.generation_config.save_pretrained(str(folder))
    write_tensors(folder / "model.safetensors", tensors)
    source = Path(getattr(model, "source_folder", "") or ".")
    for name in TOKENIZER_FILES:
        if (source / name).is_file() and source.resolve() != folder.resolve():
            shutil.copyfile(source / name, folder / name)


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


def _write_text(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _official(model: nn.Module) -> dict[str, nn.Parameter]:
    return {official_name(n): p for n, p in model.named_parameters()}


def _adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in _official(model).items() if ".lora_A." in n or ".lora_B." in n}


def _copy_exactly(
    parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], what: str, widen: bool = False
) -> None:
    missing, foreign = sorted(set(parameters) - set(tensors)), sorted(set(tensors) - set(parameters))
    if missing or foreign:
        raise ModelError(
            f"The {what} does not fit this model: {len(missing)} tensors missing (first {missing[:1]}), "
            f"{len(foreign)} that it has no place for (first {foreign[:1]}).",
            advice="It was made for another base model.",
        )
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise ModelError(
                f"The {what} does not fit this model: {name} is {list(tensors[name].shape)}, "
                f"expected {list(parameter.shape)}.",
                advice="It was made for another base model.",
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            if widen:
                parameter.data = parameter.data.to(tensors[name].dtype)
            parameter.copy_(tensors[name])
