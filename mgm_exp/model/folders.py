"""Where the parts of a model lie: checkpoint folder, tower folders, tokenizer, run folder. Reads no weights.

A folder is told by its files, never by its name (the official code dispatches on names, a common stumbling block).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mgm_exp.errors import ModelError
from mgm_exp.store import read_record, read_yaml

TINY = Path(__file__).parent / "tiny"  # the base that is shipped


@dataclass(frozen=True)
class ModelSource:
    """What has to be read to build a model.

    Attributes:
        folder: holds `config.json`, the LLM's weights and the tokenizer.
        vision_tower, vision_tower_aux: folders given by the caller; None: found through `config.json`.
        hidden_activation, image_grid, image_global, image_size_aux: override the folder's; None: obey the folder.
        attn_implementation: as asked for in a run's config; None: not asked.
        adapter: a run's adapter folder that is applied on top; None: none.
    """

    folder: Path
    vision_tower: Path | None = None
    vision_tower_aux: Path | None = None
    hidden_activation: str | None = None
    attn_implementation: str | None = None
    adapter: Path | None = None
    # Of the weights, where a run says in which precision it computes.
    dtype: str | None = None
    image_grid: int | None = None
    image_global: bool | None = None
    image_size_aux: int | None = None

    @property
    def config_overrides(self) -> dict[str, Any]:
        """Fields of `config.json` that are replaced."""
        return {key: getattr(self, key) for key in OVERRIDES if getattr(self, key) is not None}


MAX_JSON_BYTES = 256 << 20
# Keys of a `model` section that replace fields of `config.json` where they are given.
OVERRIDES = ("hidden_activation", "image_grid", "image_global", "image_size_aux")
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def find_source(path: str | Path, base: str | Path | None = None) -> ModelSource:
    """Tells a model folder from a run folder (`config.yaml` beside `adapter/` or `model/`) and from an adapter's.

    Args:
        path: The folder.
        base: The base model of an adapter folder, where that names none that exists here.

    Raises:
        ModelError: the path does not exist, or holds neither.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ModelError(
            f"Model folder {str(path)!r} {'is not a folder' if folder.exists() else 'does not exist'}.",
            advice="Give the folder that holds config.json and the safetensors files, or a run folder.",
        )
    if is_adapter(folder):  # before config.json: the official code saves one beside the adapter
        return source_of_adapter(folder, base)
    if base is not None:
        raise ModelError(f"{str(path)!r} is no adapter folder, so it takes no base.", advice="Leave --base out.")
    if (folder / "config.json").is_file():
        return ModelSource(folder)
    if (folder / "config.yaml").is_file():
        if (folder / "model" / "config.json").is_file():
            return ModelSource(folder / "model")
        if (folder / "adapter" / "adapter_config.json").is_file():
            return _base_of_run(folder)
        raise ModelError(
            f"Run folder {str(path)!r} holds neither model/ nor adapter/.",
            advice="The run has not finished its instruct stage; finish it, or load its base model.",
        )
    raise ModelError(
        f"{str(path)!r} is not a model folder: it has no config.json (and no config.yaml of a run).",
        advice="Give the folder of an MGM, or of a Gemma, Vicuna or Llama, with config.json and safetensors files.",
    )


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter alone: PEFT's, ours, or one of the official code."""
    return (folder / "adapter_config.json").is_file() and not (folder / "config.yaml").is_file()


def source_of_adapter(folder: Path, base: str | Path | None = None) -> ModelSource:
    """Base and adapter of an adapter folder.

    The official code trains LoRA on a plain Gemma too and names the towers in the config.json beside the adapter: they
    are then looked for beside the base.

    Raises:
        ModelError: the base is not there.
    """
    stated = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    named = base or stated
    places = [Path(named).expanduser(), folder / str(named)] if named else []
    place = next((one for one in places if one.is_dir()), None)
    if place is None or place.resolve() == folder.resolve():
        raise ModelError(
            f"The base model of {folder} is {named!r}, which is no folder here.", advice="Give it with --base."
        )
    source = find_source(place)
    if source.adapter is not None:
        raise ModelError(f"The base {named!r} of {folder} has an adapter itself.", advice="Merge that one first.")
    of_base = read_json(source.folder / "config.json")
    beside = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if of_base.get("mm_vision_tower") or not beside.get("mm_vision_tower"):
        return replace(source, adapter=folder)
    clip, aux = (find_tower(source, None, beside.get(key)) for key in ("mm_vision_tower", "mm_vision_tower_aux"))
    return replace(source, adapter=folder, vision_tower=clip, vision_tower_aux=aux)


def _base_of_run(run: Path) -> ModelSource:
    try:
        config = read_yaml(run / "config.yaml")
        section: dict[str, Any] = dict(config["model"])
        dtype = _DTYPES.get(config.get("train", {}).get("precision"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{run / 'config.yaml'} cannot be read as a run's config: {error}") from error
    return replace(source_of_section(section, adapter=run / "adapter"), dtype=dtype)


def source_of_section(section: dict[str, Any], adapter: Path | None = None) -> ModelSource:
    """The source that a `model` section of a config describes; without a path, the shipped tiny base."""
    folder = Path(section["path"]).expanduser() if section.get("path") else TINY
    source = find_source(folder)
    if source.adapter is not None:
        raise ModelError(
            f"model.path {str(folder)!r} is a run folder with an adapter; training starts from a complete model.",
            advice="Merge the run first (mgm-exp merge), or give the base folder.",
        )

    def as_path(key: str) -> Path | None:
        return Path(section[key]).expanduser() if section.get(key) else None

    attention = section.get("attn_implementation")
    return ModelSource(
        folder=source.folder,
        vision_tower=as_path("vision_tower"),
        vision_tower_aux=as_path("vision_tower_aux"),
        **{key: section.get(key) for key in OVERRIDES},
        attn_implementation=str(getattr(attention, "value", attention)) if attention is not None else None,
        adapter=adapter,
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model folder.

    Raises:
        ModelError: missing, not JSON, or not an object.
    """
    try:
        value = read_record(path, MAX_JSON_BYTES)
    except FileNotFoundError:
        raise ModelError(f"{path} is missing.", advice="The model folder is incomplete; copy it again.") from None
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, expected a JSON object.")
    return value


def find_tower(source: ModelSource, given: Path | None, named: str | None) -> Path | None:
    """A tower's folder: the one given, else the one `config.json` names.

    A named path that does not exist is looked up by its last component in the checkpoint folder, its parent and the
    parent's `towers/` (official configs hold paths of the machine they were trained on).

    Raises:
        ModelError: a folder was given and does not exist.
    """
    if given is not None:
        if not given.is_dir():
            raise ModelError(f"Tower folder {str(given)!r} does not exist.", advice="Check model.vision_tower(_aux).")
        return given
    if not named:
        return None
    here = source.folder.resolve()
    name = Path(named).name
    candidates = [Path(named), here / name, here.parent / name, here.parent / "towers" / name, here / "towers" / name]
    return next((c for c in candidates if c.is_dir()), None)


def stated_clip_size(name: str | None) -> tuple[int, int] | None:
    """Patch and image size that a CLIP folder's name states ("...patch14-336" -> (14, 336)); None if it does not."""
    found = re.search(r"patch(\d+)-(\d+)$", Path(name).name) if name else None
    return (int(found[1]), int(found[2])) if found else None
