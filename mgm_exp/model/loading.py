"""From a folder to a model, with a report of every tensor that was missing, unexpected or new.

Tensors are put in place by their official names. A missing tensor of the LLM or of a tower is an error; a missing
connector (a plain LLM, or a base without a projector) starts from seeded values and is reported.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.initialization import no_init_weights

from mgm_exp.errors import MissingDependencyError, ModelError
from mgm_exp.model import resident
from mgm_exp.model.attention import AttentionChoice, choose_attention
from mgm_exp.model.configuration import MGMConfig
from mgm_exp.model.folders import ModelSource, find_source, find_tower, read_json, source_of_section
from mgm_exp.model.mgm import MGMForConditionalGeneration, new_model
from mgm_exp.model.resolve import resolve_config
from mgm_exp.model.templates import ENDS_OF_TURN
from mgm_exp.model.tensors import (
    CLIP_PREFIX,
    CONNECTOR,
    CONVNEXT_PREFIX,
    TensorPlace,
    checkpoint_name,
    clip_name,
    convnext_name,
    read_one,
    read_tensors,
    tensor_map,
    with_packed,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadReport:
    """What was read from where.

    Attributes:
        folder: the checkpoint folder.
        sources: part ("llm", "vision_tower", "vision_tower_aux", "connector") -> where its tensors came from.
        missing: tensors the model has and no file held (only connector tensors can be: others are errors).
        initialised: the missing tensors that started from seeded values (the same as `missing`).
        unexpected: tensors in the checkpoint that the model has no place for.
        ignored: tensors of the tower folders that MGM does not use (text half, heads), and a tied head's copy.
        mismatched: shape conflicts; always empty in a report (they are an error), kept for the record's form.
        attention, attention_reason: the kernel in use and why.
        activation: of the LLM's MLP ("gelu" is the erf form).
        dtype, device: of the weights.
        adapter: folder of the adapter that was applied, or "".
    """

    folder: str
    sources: dict[str, str]
    missing: tuple[str, ...]
    initialised: tuple[str, ...]
    unexpected: tuple[str, ...]
    ignored: tuple[str, ...]
    mismatched: tuple[str, ...]
    attention: str
    attention_reason: str
    activation: str
    dtype: str
    device: str
    adapter: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The report in words, a line a fact."""
        out = [f"{part}: from {where}" for part, where in self.sources.items()]
        out.append(f"attention {self.attention} ({self.attention_reason}), activation {self.activation}, {self.dtype}")
        for label, names in (("initialised", self.initialised), ("unexpected", self.unexpected)):
            out += [f"{label}: {name}" for name in names]
        if self.ignored:
            out.append(f"ignored: {len(self.ignored)} tensors that MGM does not use")
        return out


@dataclass(frozen=True)
class TensorPlan:
    """Official name -> place in a file, for everything a model needs that exists on disk."""

    places: dict[str, TensorPlace]
    sources: dict[str, str]
    ignored: tuple[str, ...]


def load_model(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    base: str | Path | None = None,
) -> MGMForConditionalGeneration:
    """Loads an MGM model, in eval mode, towers frozen.

    Args:
        path: a folder with official tensor names and `config.json` (sharded or single safetensors, towers inside or
            beside), one of our own `save_pretrained`, a run folder or an adapter folder (the adapter is applied).
        device: "cpu", "cuda", "cuda:1", ...
        dtype: of the weights, "bfloat16", torch.float32, ...; None: the precision of the run's training, or what
            `config.json` says, else float32.
        attn_implementation: "auto" (the default), "eager", "sdpa" or "flash_attention_2".
        base: the base of an adapter folder that names none which exists here.

    Returns:
        The model; its `load_report` says what came from where.

    Raises:
        ModelError: the folder cannot be used: what was found, what is needed, what to do.
        MissingDependencyError: a device or a kernel that is not there.
    """
    return load_source(find_source(path, base), device=device, dtype=dtype, attn_implementation=attn_implementation)


def load_source(
    source: ModelSource,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
) -> MGMForConditionalGeneration:
    """As `load_model`, for a source that is known already."""
    asked = attn_implementation or source.attn_implementation
    model, report = _load(source, device=device, dtype=dtype or source.dtype, asked_attention=asked, seed=0)
    if source.adapter is not None:
        from mgm_exp.model.adapters import load_adapter

        load_adapter(model, source.adapter)
        report = replace(report, adapter=str(source.adapter))
        model.load_report = report
    return model


def build_model(
    model_config: Any, *, device: str | torch.device = "cpu", dtype: str | torch.dtype | None = None, seed: int = 0
) -> tuple[MGMForConditionalGeneration, LoadReport]:
    """Builds the model that a `model` section of the config describes.

    Args:
        model_config: `mgm_exp.config.ModelConfig` or a mapping with its keys.
        device, dtype: as for `load_model`.
        seed: of connector tensors that the folder does not hold.

    Raises:
        ModelError, MissingDependencyError: as `load_model`.
    """
    section = _as_mapping(model_config)
    source = source_of_section(section)
    model, report = _load(source, device=device, dtype=dtype, asked_attention=source.attn_implementation, seed=seed)
    if blocks := section.get("gradient_checkpointing"):
        model.enable_gradient_checkpointing(blocks)
    form = section.get("mining", "native")
    model.model.mines_natively = getattr(form, "value", form) == "native"
    return model, report


def meta_model(config: MGMConfig) -> MGMForConditionalGeneration:
    """The model without memory for its weights (meta device): for counting and planning."""
    with torch.device("meta"), no_init_weights():
        model = new_model(config)
        model.tie_weights()
    freeze_towers(model)
    return model


def freeze_towers(model: MGMForConditionalGeneration) -> None:
    """Neither tower is trained; `optimize_vision_tower` in a folder says how it was made, not what to do now."""
    model.model.vision_tower.requires_grad_(False)
    model.model.vision_tower_aux.requires_grad_(False)
    model.train(model.training)


def plan_tensors(source: ModelSource, config: MGMConfig) -> TensorPlan:
    """Finds every tensor of a model on disk: the checkpoint's own first, tower folders for what it lacks.

    Raises:
        ModelError: a file is missing or damaged.
    """
    found = tensor_map(source.folder)
    ignored: list[str] = []
    if config.tie_word_embeddings and found.pop("lm_head.weight", None):
        ignored.append("lm_head.weight")
    places: dict[str, TensorPlace] = {}
    for key, place in found.items():
        if key.endswith(("rotary_emb.inv_freq", "position_ids")):
            ignored.append(key)  # buffers that old files hold
        else:
            places[checkpoint_name(key)] = place
    places = with_packed(places)
    sources = {"llm": str(source.folder)}
    towers = (
        ("vision_tower", CLIP_PREFIX, clip_name, source.vision_tower, config.mm_vision_tower),
        ("vision_tower_aux", CONVNEXT_PREFIX, convnext_name, source.vision_tower_aux, config.mm_vision_tower_aux),
    )
    for part, prefix, rename, given, named in towers:
        inside = {name for name in places if name.startswith(prefix)}
        sources[part] = str(source.folder) if inside else "nowhere"
        folder = find_tower(source, given, named)
        wanted = _tower_names(part, config)
        if inside >= wanted or folder is None:
            continue
        taken = 0
        for key, place in tensor_map(folder).items():
            name = rename(key)
            if name is None or name not in wanted:
                ignored.append(key)
            elif name not in places:
                places[name] = place
                taken += 1
        sources[part] = f"{source.folder} and {folder}" if inside and taken else str(folder)
    sources["connector"] = str(source.folder) if any(CONNECTOR.fullmatch(n) for n in places) else "seeded values"
    return TensorPlan(places, sources, tuple(sorted(ignored)))


def seeded_uniform(shape: tuple[int, ...], bound: float, seed: int, name: str) -> Tensor:
    """U(-bound, bound) in fp32 on the CPU, a function of the seed and the tensor's name alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def connector_start(name: str, shapes: Mapping[str, tuple[int, ...]], seed: int) -> Tensor:
    """First value of a connector tensor: torch's own initialisation, as the official code has it, but seeded."""
    if is_norm(name):
        return torch.ones(shapes[name]) if name.endswith(".weight") else torch.zeros(shapes[name])
    fan_in = shapes[name.rsplit(".", 1)[0] + ".weight"][1]
    return seeded_uniform(shapes[name], 1 / math.sqrt(fan_in), seed, name)


def is_norm(name: str) -> bool:
    """Whether a connector tensor belongs to a LayerNorm (first layer of the three mining projections)."""
    return "vlm_uni_" in name and name.rsplit(".", 2)[1] == "0"


def _load(
    source: ModelSource,
    *,
    device: str | torch.device,
    dtype: str | torch.dtype | None,
    asked_attention: str | None,
    seed: int,
) -> tuple[MGMForConditionalGeneration, LoadReport]:
    target = _check_device(device)
    config = resolve_config(source)
    weights_dtype = _check_dtype(dtype, config)
    attention = choose_attention(asked_attention, target, weights_dtype)
    config._attn_implementation = attention.name
    config.dtype = weights_dtype
    return resident.base_of(
        ("mgm", repr(source), str(target), str(weights_dtype), repr(attention)),
        seed,
        lambda: _read(source, config, target, weights_dtype, attention, seed),
    )


def _read(
    source: ModelSource,
    config: MGMConfig,
    target: torch.device,
    weights_dtype: torch.dtype,
    attention: AttentionChoice,
    seed: int,
) -> resident.Loaded:
    plan = plan_tensors(source, config)
    stamps = resident.stamps_of(sorted({source.folder, *(place.file.parent for place in plan.places.values())}))
    model = _empty_model(config, target, weights_dtype)
    report = _fill(model, source, plan, attention, seed)
    _keep_packed(model, plan, target)
    freeze_towers(model)
    model.eval()
    model.generation_config.eos_token_id = stop_ids(source.folder, config)
    model.source_folder = str(source.folder)
    model.load_report = report
    for line in report.lines():
        log.info("%s", line)
    return resident.Loaded(model, report, stamps, seed if report.initialised else None)


def _fill(
    model: MGMForConditionalGeneration, source: ModelSource, plan: TensorPlan, attention: AttentionChoice, seed: int
) -> LoadReport:
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    unexpected = tuple(sorted(set(plan.places) - set(parameters)))
    missing = sorted(set(parameters) - set(plan.places))
    if fatal := [name for name in missing if not CONNECTOR.fullmatch(name)]:
        raise ModelError(
            f"{source.folder} lacks {len(fatal)} tensors of the LLM or the towers, the first is {fatal[0]!r} "
            f"(towers were looked for in: {plan.sources['vision_tower']}; {plan.sources['vision_tower_aux']}).",
            advice="Complete the folder, or set model.vision_tower and model.vision_tower_aux to the towers' folders.",
        )
    wrong = [
        f"{name} is {list(plan.places[name].shape)} in {plan.places[name].file.name}, expected {list(shapes[name])}"
        for name in sorted(set(parameters) & set(plan.places))
        if plan.places[name].shape != shapes[name]
    ]
    if wrong:
        raise ModelError(
            f"{len(wrong)} tensors do not fit the configuration of {source.folder}: {'; '.join(wrong[:3])}"
            f"{'; ...' if len(wrong) > 3 else ''}.",
            advice="config.json and weights (or a tower of another size) do not belong together.",
        )
    with torch.no_grad():
        for name, tensor in read_tensors({n: p for n, p in plan.places.items() if n in parameters}):
            parameters[name].copy_(tensor)
        for name in missing:
            parameters[name].copy_(connector_start(name, shapes, seed))
    config = model.config
    return LoadReport(
        folder=str(source.folder),
        sources=plan.sources,
        missing=tuple(missing),
        initialised=tuple(missing),
        unexpected=unexpected,
        ignored=plan.ignored,
        mismatched=(),
        attention=attention.name,
        attention_reason=attention.reason,
        activation=config.activation,
        dtype=str(config.dtype).removeprefix("torch."),
        device=str(next(model.parameters()).device),
    )


def _keep_packed(model: MGMForConditionalGeneration, plan: TensorPlan, device: torch.device) -> None:
    """Weights of few bits stay so on a GPU; elsewhere, and without bitsandbytes, they are expanded: equal numbers."""
    packed = {name: place.packed for name, place in plan.places.items() if place.packed is not None}
    if not packed:
        return
    if device.type != "cuda" or find_spec("bitsandbytes") is None:
        why = "bitsandbytes is not installed" if device.type == "cuda" else f"the device is {device.type}"
        log.info("%d weights of few bits are expanded to %s: %s", len(packed), model.config.dtype, why)
        return
    from mgm_exp.model.quantized import keep_packed

    keep_packed(model, packed, lambda name, key: read_one(plan.places[name].file, key))


def _empty_model(config: MGMConfig, device: torch.device, dtype: torch.dtype) -> MGMForConditionalGeneration:
    with _default_dtype(dtype), torch.device(device), no_init_weights():
        model = new_model(config)
        model.tie_weights()
    # A buffer made under a bf16 default would stay rounded if the model is cast up later
    if config.embed_scale != 1.0:
        model.model.embed_tokens.embed_scale = torch.tensor(config.embed_scale, dtype=torch.float32, device=device)
    return model


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _tower_names(part: str, config: MGMConfig) -> set[str]:
    prefix = "model.vision_tower." if part == "vision_tower" else CONVNEXT_PREFIX
    with torch.device("meta"), no_init_weights():
        from mgm_exp.model.clip import ClipTower
        from mgm_exp.model.convnext import ConvNeXtTower

        tower = (
            ClipTower(config.vision_config or {}, config.mm_vision_select_layer)
            if part == "vision_tower"
            else ConvNeXtTower(config.vision_aux_config or {})
        )
    return {prefix + name for name, _ in tower.named_parameters()}


def stop_ids(folder: Path, config: MGMConfig) -> list[int]:
    """Tokens that end an answer: the config's end of sequence, and the end of a turn where the tokenizer has one."""
    eos = config.eos_token_id
    ids = list(eos) if isinstance(eos, (list, tuple)) else [eos] if eos is not None else []
    path = folder / "tokenizer_config.json"
    if path.is_file():
        for key, token in read_json(path).get("added_tokens_decoder", {}).items():
            if isinstance(token, dict) and token.get("content") in ENDS_OF_TURN and int(key) not in ids:
                ids.append(int(key))
    return ids


def _check_device(device: str | torch.device) -> torch.device:
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"device {device!r} is not known: allowed are cpu, cuda, cuda:N.") from error
    if target.type == "cuda" and (not torch.cuda.is_available() or (target.index or 0) >= torch.cuda.device_count()):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise MissingDependencyError(
            f"device {str(device)!r} was asked for, but {count} CUDA devices are usable here.",
            advice="Use device cpu, or check the driver and that torch is a CUDA build.",
        )
    return target


def _check_dtype(dtype: str | torch.dtype | None, config: MGMConfig) -> torch.dtype:
    given = dtype if dtype is not None else getattr(config, "dtype", None) or torch.float32
    found = getattr(torch, given.removeprefix("torch."), None) if isinstance(given, str) else given
    if found not in (torch.float32, torch.bfloat16, torch.float16):
        raise ModelError(f"dtype {given!r} is not allowed: use float32, bfloat16 or float16.")
    return found


def _as_mapping(section: Any) -> dict[str, Any]:
    if is_dataclass(section) and not isinstance(section, type):
        return asdict(section)
    return dict(section)
