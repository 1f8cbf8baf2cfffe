"""Writes a trained model as one folder that needs nothing else: official names, shards, tokenizer, card, record.

The folder loads with `load_model` and in the official code, which wants an index, and projector, mining and CLIP in
one file (it fills the tower, strictly, from each shard that holds `vlm_uni`): they are never divided.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from mgm_exp.errors import DiskFullError, ModelError
from mgm_exp.model.adapter_export import FILES, write_adapter, write_card
from mgm_exp.model.adapters import TOKENIZER_FILES, adapter_files, write_tensors
from mgm_exp.model.card import model_card
from mgm_exp.model.folders import (
    OVERRIDES,
    TINY,
    ModelSource,
    find_source,
    find_tower,
    is_adapter,
    read_json,
    source_of_adapter,
)
from mgm_exp.model.hf.merge import hf_run, merge_hf
from mgm_exp.model.loading import stop_ids
from mgm_exp.model.merged_tensors import DTYPES, MergedTensors
from mgm_exp.model.quantized import KINDS, is_packed, packer, settings
from mgm_exp.model.tensor_stream import stream_tensors
from mgm_exp.model.tokenizer import load_tokenizer
from mgm_exp.store import file_sha256, read_yaml, write_atomic, write_json_atomic

RECORD = "merge.json"
INDEX = "model.safetensors.index.json"
SCHEMA_VERSION = 1
SHARD_BYTES = 2**30
ADAPTER = "peft"
EXPORTS = ("safetensors", ADAPTER, *KINDS)
_VISION = ("model.mm_projector.", "model.vlm_uni_", "model.vision_tower.", "model.vision_tower_aux.")


@dataclass(frozen=True)
class Merged:
    """What a merge wrote: `tensors` of them, `n_bytes` in `shards` files, `adapted` of them changed by the adapter."""

    folder: Path
    tensors: int
    adapted: int
    shards: int
    n_bytes: int
    dtype: str
    export: str = "safetensors"


def merge_run(
    run: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    license_name: str | None = None,
    export: str = "safetensors",
    device: str | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Merged:
    """Merges a run into one standalone folder.

    Args:
        run: a run folder, after LoRA or full training, or an adapter folder (also one of the official code:
            `adapter_model.bin`, `non_lora_trainables.bin`).
        out: new or empty; it appears whole or not at all.
        base: the base model's folder, where an adapter folder does not name one that exists.
        dtype: of the weights; None: as the base stores its LLM.
        shard_bytes: size of a file; one tensor, and the vision part, may be larger.
        license_name: for the card; None: what the base's card says.
        export: "safetensors": a standalone model; "int8", "nf4": the same with the LLM's linear layers in few bits
            (see `quantized.py`); "peft": the adapter alone (see `adapter_export.py`).
        device: where they are made; None: the first CUDA GPU.
        on_progress: called with (what, bytes written, bytes in all).

    Raises:
        MissingDependencyError: few bits are asked for without a GPU or bitsandbytes.
        ModelError: parts that do not fit together, or an `out` that holds something.
        DiskFullError: there is no space for it.
    """
    run, out = Path(run).expanduser(), Path(out).expanduser().absolute()
    if shard_bytes < 1:
        raise ModelError(f"A shard of {shard_bytes} bytes cannot be written.", advice="Give a size like 2GiB.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out} exists and is not empty.", advice="Give a new folder with --out, or remove this one.")
    if export not in EXPORTS:
        raise ModelError(f"There is no export {export!r}.", advice=f"There are {', '.join(EXPORTS)}.")
    other = hf_run(run, base)
    if other is not None:
        if export != "safetensors":
            raise ModelError(
                f"--export {export} is for MGM; {run} is a run of a model of transformers.",
                advice="Its adapter/ folder is in PEFT's form already; few bits are made by transformers.",
            )
        with _folder_beside(out, run) as partial:
            made = merge_hf(other, partial, out, dtype=dtype, shard_bytes=shard_bytes, license_name=license_name)
        return Merged(out, **made)
    pack = packer(export, device) if export in KINDS else None
    source = source_of_run(run, base)
    merged = MergedTensors(source, dtype)
    n_bytes = 0 if export == ADAPTER else sum(_n_bytes(merged, name) for name in merged.shapes)
    with _folder_beside(out, run) as partial:
        _check_space(partial, n_bytes)
        try:
            origin = _origin(run, source)
            if export == ADAPTER:
                n_tensors, n_written = write_adapter(source, partial, _name(origin))
                shards = {name: name for name in FILES if (partial / name).suffix == ".safetensors"}
                shards = {name: name for name in shards if (partial / name).is_file()}
                write_card(_facts(run), _name(origin), origin, merged, license_name, partial)
            else:
                n_tensors = len(merged.shapes)
                shards, n_written = _write_shards(merged, partial, shard_bytes, n_bytes, pack, on_progress)
                _write_settings(source, merged, partial, export)
                card = model_card(_facts(run), _name(origin), origin, merged, license_name)
                write_atomic(partial / "README.md", card)
            _copy_licenses(origin, partial)
            write_json_atomic(partial / RECORD, _record(run, source, merged, partial, out, shards) | {"export": export})
        except (OSError, SafetensorError) as error:
            if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
                raise DiskFullError(
                    f"No space is left for {out}.", advice="Free some, or give another --out."
                ) from error
            raise
    n_shards = len(set(shards.values()))
    return Merged(out, n_tensors, merged.n_changed, n_shards, n_written, merged.dtype, export)


def source_of_run(run: Path, base: str | Path | None = None) -> ModelSource:
    """Base and adapter of a run folder, or of an adapter folder.

    Raises:
        ModelError: it is neither, or the base is not there.
    """
    if is_adapter(run):
        adapter_files(run)
        return source_of_adapter(run, base)
    source = find_source(run)
    if not (run / "config.yaml").is_file():
        raise ModelError(
            f"{run} is a model that stands alone already.", advice="Give the folder of a run, or of an adapter."
        )
    if base is not None:
        source = replace(source, folder=find_source(base).folder)
    return source


def recorded_source(folder: Path, record: Mapping[str, Any]) -> ModelSource:
    """Base and adapter that a merge record names; its paths are relative to its folder."""

    def place(name: str) -> Path | None:
        given = record["base"].get(name)
        return Path(os.path.normpath(folder.absolute() / given)) if given else None

    adapter = record["run"].get("adapter")
    return ModelSource(
        folder=place("folder") or TINY,
        vision_tower=place("vision_tower"),
        vision_tower_aux=place("vision_tower_aux"),
        **{key: record["base"].get(key) for key in OVERRIDES},
        adapter=Path(os.path.normpath(folder.absolute() / adapter)) if adapter else None,
    )


def adapter_fingerprints(adapter: Path | None) -> dict[str, str]:
    """SHA-256 of each file that an adapter consists of."""
    if adapter is None:
        return {}
    weights, connector = adapter_files(adapter)
    files = [adapter / "adapter_config.json", weights, *([connector] if connector else [])]
    return {file.name: file_sha256(file) for file in files}


@contextmanager
def _folder_beside(out: Path, run: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name in the end; what a killed merge of the same run left is replaced."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.merging")
    note = partial / "unfinished.json"
    try:
        partial.mkdir()
    except FileExistsError:
        owner = read_json(note).get("run") if note.is_file() else None
        if owner != str(run.absolute()) and any(partial.iterdir()):
            raise ModelError(
                f"{partial} is an unfinished merge of {owner or 'something else'}.", advice="Remove it first."
            ) from None
    with open(partial / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ModelError(f"Another process is writing {out}.", advice="Wait for it.") from None
        write_json_atomic(note, {"run": str(run.absolute())})
        try:
            for old in partial.iterdir():
                if old.name not in ("lock", note.name):
                    shutil.rmtree(old) if old.is_dir() else old.unlink()
            yield partial
            note.unlink()
            (partial / "lock").unlink()
            try:
                os.rename(partial, out)  # onto an empty folder, or onto nothing
            except OSError as error:
                raise ModelError(f"{out} was filled meanwhile by somebody else: {error}") from error
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed * 1.02:
        raise DiskFullError(
            f"The merged model takes {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free at {folder.parent}.",
            advice="Free some space, or give another --out.",
        )


def _write_shards(
    merged: MergedTensors,
    folder: Path,
    shard_bytes: int,
    n_bytes: int,
    pack: Callable[[str, Tensor], dict[str, Tensor]] | None,
    on_progress: Callable[[str, int, int], None] | None,
) -> tuple[dict[str, str], int]:
    """Writes all files; file of each key, and the bytes of their tensors."""
    groups = _divide(merged, shard_bytes)
    weight_map: dict[str, str] = {}
    done = written = 0
    for number, names in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        if pack is None:
            shapes = {name: merged.shapes[name] for name in names}
            written += stream_tensors(folder / file, shapes, DTYPES[merged.dtype], merged.read(names))
            weight_map.update(dict.fromkeys(names, file))
        else:
            tensors: dict[str, Tensor] = {}
            for name, tensor in merged.read(names):
                tensors.update(pack(name, tensor) if is_packed(name) else {name: tensor})
            write_tensors(folder / file, tensors)
            weight_map.update(dict.fromkeys(tensors, file))
            written += sum(t.numel() * t.element_size() for t in tensors.values())
            del tensors
        os.chmod(folder / file, 0o644)  # safetensors writes for its owner alone
        done += sum(_n_bytes(merged, name) for name in names)
        if on_progress is not None:
            on_progress("bytes merged", done, n_bytes)
    index = {"metadata": {"total_size": written}, "weight_map": dict(sorted(weight_map.items()))}
    write_json_atomic(folder / INDEX, index)
    return weight_map, written


def _divide(merged: MergedTensors, shard_bytes: int) -> list[list[str]]:
    """Names of each shard: the LLM by size, then all of the vision part in one."""
    groups: list[list[str]] = []
    size = 0
    for name in merged.shapes:
        if name.startswith(_VISION):
            continue
        n = _n_bytes(merged, name)
        if not groups or size + n > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += n
    return [*groups, [name for name in merged.shapes if name.startswith(_VISION)]]


def _n_bytes(merged: MergedTensors, name: str) -> int:
    count = 1
    for side in merged.shapes[name]:
        count *= side
    return count * torch.finfo(DTYPES[merged.dtype]).bits // 8


def _write_settings(source: ModelSource, merged: MergedTensors, folder: Path, export: str) -> None:
    """config.json, generation_config.json, and what the processor needs."""
    from transformers import GenerationConfig

    config = merged.config
    config.dtype = merged.dtype
    fields = json.loads(config.to_json_string(use_diff=False))
    for key in ("mm_vision_tower", "mm_vision_tower_aux"):
        if fields.get(key) and Path(fields[key]).is_absolute():
            fields[key] = Path(fields[key]).name  # of the machine it was made on
    fields.pop("_name_or_path", None)
    # The official code's class, and its spelling of dtype and of the rotary base
    fields |= {"architectures": [config.backbone.official_class], "torch_dtype": merged.dtype}
    if theta := (fields.get("rope_parameters") or {}).get("rope_theta"):
        fields["rope_theta"] = theta
    fields.pop("quantization_config", None)  # of a base that was read from few bits
    if export != "safetensors":
        fields["quantization_config"] = settings(export, merged.dtype)
    write_json_atomic(folder / "config.json", fields)
    for name in TOKENIZER_FILES:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, folder / name)
    if not (folder / "tokenizer.json").is_file():  # Vicuna has tokenizer.model alone
        load_tokenizer(source.folder, config.backbone).backend_tokenizer.save(str(folder / "tokenizer.json"))
    tower = find_tower(source, source.vision_tower, config.mm_vision_tower)
    pixels = tower / "preprocessor_config.json" if tower is not None else None
    if pixels is not None and pixels.is_file() and not (folder / pixels.name).is_file():
        shutil.copyfile(pixels, folder / pixels.name)
    if (source.folder / "generation_config.json").is_file():
        shutil.copyfile(source.folder / "generation_config.json", folder / "generation_config.json")
    else:
        stops = stop_ids(source.folder, config)
        GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=stops, pad_token_id=config.pad_token_id, do_sample=False
        ).save_pretrained(str(folder))


def _copy_licenses(base: Path, folder: Path) -> None:
    for path in sorted(base.iterdir()) if base.is_dir() else ():
        if path.is_file() and path.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE")):
            shutil.copyfile(path, folder / path.name)


def _facts(run: Path) -> dict[str, dict[str, Any]]:
    """`result.json` and `manifest.json` of the run; an adapter folder has none."""
    names = ("result.json", "manifest.json")
    return {name.partition(".")[0]: read_json(run / name) if (run / name).is_file() else {} for name in names}


def _origin(run: Path, source: ModelSource) -> Path:
    """The folder that training started from; it need not be there any more after full training."""
    if source.adapter is not None:
        return source.folder
    try:
        path = read_yaml(run / "config.yaml")["model"].get("path")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{run / 'config.yaml'} cannot be read as a run's config: {error}") from error
    return Path(path).expanduser() if path else TINY


def _name(folder: Path) -> str:
    return "tiny-mgm" if folder == TINY else folder.absolute().name


def _record(
    run: Path, source: ModelSource, merged: MergedTensors, folder: Path, out: Path, shards: Mapping[str, str]
) -> dict[str, Any]:
    def relative(path: Path | None) -> str | None:
        return os.path.relpath(path.absolute(), out) if path is not None else None

    others = sorted(p.name for p in folder.iterdir() if p.name not in ("lock", "unfinished.json"))
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": merged.kind or "full",
        "dtype": merged.dtype,
        "base": {
            "name": _name(_origin(run, source)),
            "folder": None if source.folder == TINY else relative(source.folder),
            "vision_tower": relative(source.vision_tower),
            "vision_tower_aux": relative(source.vision_tower_aux),
            **{key: getattr(source, key) for key in OVERRIDES},
        },
        "run": {
            "id": _facts(run)["result"].get("run_id"),
            "folder": relative(run),
            "adapter": relative(source.adapter),
            "sha256": adapter_fingerprints(source.adapter),
        },
        "lora": {"scale": merged.scale, "weights": len(merged.adapted)},
        "n_tensors": len(merged.shapes),
        "shards": {name: file_sha256(folder / name) for name in sorted(set(shards.values()))},
        "files": {name: file_sha256(folder / name) for name in others if name not in set(shards.values())},
    }
