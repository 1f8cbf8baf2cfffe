"""Proves that a merged folder is whole and equal to its base and adapter; names what is wrong where it is not.

Files are compared with the merge record, tensors with the configuration, weights with base and adapter
added anew, and logits of both on pictures and questions that go through the processor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mgm_exp.errors import ModelError
from mgm_exp.model.adapter_export import check_adapter
from mgm_exp.model.card import stated_license
from mgm_exp.model.finding import Finding, some
from mgm_exp.model.folders import ModelSource, find_source, read_json
from mgm_exp.model.logits_check import TOLERANCES, answers_of, check_logits, pictures_of, without_logits
from mgm_exp.model.merged_tensors import STORED, MergedTensors
from mgm_exp.model.processor import load_processor
from mgm_exp.model.quantized import KINDS, Packed, agrees, is_packed, kind_of, unpack
from mgm_exp.model.standalone import (
    ADAPTER,
    INDEX,
    RECORD,
    SCHEMA_VERSION,
    adapter_fingerprints,
    recorded_source,
    source_of_run,
)
from mgm_exp.model.tensors import TensorPlace, with_packed
from mgm_exp.store import file_sha256

_VISION_PARTS = ("model.mm_projector.", "model.vlm_uni_", "model.vision_tower.", "model.vision_tower_aux.")
OFFICIAL_FIELDS = (
    *("architectures", "model_type", "torch_dtype", "hidden_size", "vocab_size", "mm_projector_type"),
    *("mm_vision_tower", "mm_vision_tower_aux", "mm_vision_select_layer", "mm_hidden_size", "mm_hidden_size_aux"),
    *("image_size_aux", "image_aspect_ratio", "mm_use_im_start_end", "mm_use_im_patch_token"),
)
_NEEDED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md")


@dataclass(frozen=True)
class _Found:
    """A tensor in a shard."""

    file: str
    shape: tuple[int, ...]
    dtype: str


def check_merged(
    folder: str | Path,
    *,
    run: str | Path | None = None,
    base: str | Path | None = None,
    images: Sequence[Path] = (),
    device: str = "cpu",
    with_logits: bool = True,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> list[Finding]:
    """Looks at everything; the folder is proven when every finding holds.

    Args:
        folder: written by `merge_run`.
        run: where the run is now, if it is not where the record says.
        base: where the base is now, likewise.
        images: pictures to compare logits on; none: three that are drawn.
        device: for the logits; both models compute in fp32, one after the other.
        with_logits: False leaves them out: no model is loaded, and the folder is not wholly proven.
        on_progress: called with (what, tensors compared, tensors in all).

    Raises:
        ModelError: no merged folder, or its base or adapter cannot be found.
    """
    folder = Path(folder).expanduser()
    record = read_record(folder)
    if record.get("family") == "hf":
        from mgm_exp.model.hf.check import check_hf_merged

        pictures = pictures_of(images) if with_logits else None
        return check_hf_merged(folder, record, run=run, base=base, pictures=pictures, device=device)
    source = _source(folder, record, run, base)
    if record["export"] == ADAPTER:
        pictures = pictures_of(images)
        answers = (lambda one: answers_of(one, pictures, device)) if with_logits else None
        of_adapter = check_adapter(folder, source, answers)
        return [_adapter(source, record), *files_as_written(folder, record), *of_adapter, _card(folder)]
    expected = MergedTensors(source, record["dtype"])
    findings = [_adapter(source, record)]
    findings += files_as_written(folder, record)
    found, damaged = headers_of(folder, record)
    findings += [damaged, _index(folder, found)]
    found, packed, few_bits = _packed(folder, found, expected, record["export"])
    findings += few_bits
    findings += _tensors(expected, found, is_complete=damaged.holds is True)
    findings += _weights(folder, expected, found, packed, on_progress)
    if record["export"] == "safetensors":
        findings.append(_official(folder, found))
    findings += _processor(folder)
    if with_logits:
        stored = record["dtype"] if record["export"] == "safetensors" else record["export"]
        findings.append(check_logits(folder, source, stored, pictures_of(images), device))
    else:
        findings.append(without_logits())
    return findings


def read_record(folder: Path) -> dict[str, Any]:
    """The merge record of a folder.

    Raises:
        ModelError: there is none, or it is of no use.
    """
    if not (folder / RECORD).is_file():
        raise ModelError(f"{folder} has no {RECORD}: it was not written by mgm-exp merge.")
    record = read_json(folder / RECORD)
    if record.get("schema_version") != SCHEMA_VERSION:
        raise ModelError(
            f"{folder / RECORD} has schema_version {record.get('schema_version')!r}, not {SCHEMA_VERSION}."
        )
    sections = ("base", "run", "lora", "shards", "files")
    if wrong := [key for key in sections if not isinstance(record.get(key), dict)] or not record["shards"]:
        raise ModelError(f"{folder / RECORD} is damaged: {wrong if wrong is not True else 'no shards'}.")
    names = [*record["shards"], *record["files"]]
    if outside := [name for name in names if Path(name).name != name]:
        raise ModelError(f"{folder / RECORD} points outside its folder ({outside[0]!r}).")
    if record.get("dtype") not in TOLERANCES:
        raise ModelError(f"{folder / RECORD} is damaged: dtype {record.get('dtype')!r}.")
    if record.setdefault("export", "safetensors") not in ("safetensors", ADAPTER, *KINDS):
        raise ModelError(f"{folder / RECORD} is damaged: export {record['export']!r}.")
    return record


def _source(folder: Path, record: Mapping[str, Any], run: str | Path | None, base: str | Path | None) -> ModelSource:
    recorded = recorded_source(folder, record)
    if run is not None:
        given = source_of_run(Path(run).expanduser(), base or recorded.folder)
        recorded = replace(recorded, adapter=given.adapter, folder=given.folder)
    elif base is not None:
        recorded = replace(recorded, folder=find_source(base).folder)
    for what, place in (("base", recorded.folder), ("run", recorded.adapter)):
        if place is not None and not place.is_dir():
            raise ModelError(
                f"{folder / RECORD} names {place}, which does not exist.", advice=f"Say where it is now with --{what}."
            )
    return recorded


def _adapter(source: ModelSource, record: Mapping[str, Any]) -> Finding:
    if source.adapter is None:
        return Finding("run", True, "full training: the run's own weights")
    recorded, now = record["run"].get("sha256"), adapter_fingerprints(source.adapter)
    if recorded != now:
        other = sorted(name for name in {*(recorded or {}), *now} if (recorded or {}).get(name) != now.get(name))
        return Finding("run", False, f"the adapter is not the one that was merged: {', '.join(other)} changed")
    return Finding("run", True, f"the adapter is the one that was merged ({len(now)} files by SHA-256)")


def files_as_written(folder: Path, record: Mapping[str, Any]) -> list[Finding]:
    findings = []
    for what, names in (("SHA-256 of shards", record["shards"]), ("SHA-256 of other files", record["files"])):
        missing = [name for name in names if not (folder / name).is_file()]
        changed = [n for n in names if n not in missing and file_sha256(folder / n) != names[n]]
        wrong = [f"{name} is missing" for name in missing] + [f"bytes of {name} changed" for name in changed]
        findings.append(Finding(what, not wrong, some(wrong) or f"{len(names)} files as they were written"))
    return findings


def headers_of(folder: Path, record: Mapping[str, Any]) -> tuple[dict[str, _Found], Finding]:
    """Every tensor that lies in a shard; the official names are those of the files."""
    found: dict[str, _Found] = {}
    wrong = []
    extra = sorted(p.name for p in folder.glob("*.safetensors") if p.name not in record["shards"])
    wrong += [f"{name} belongs to no merge" for name in extra]
    for name in record["shards"]:
        try:
            with safe_open(str(folder / name), framework="pt") as handle:
                for key in handle.keys():  # noqa: SIM118 - not a dict
                    if key in found:
                        wrong.append(f"{key} lies in two shards")
                    part = handle.get_slice(key)
                    found[key] = _Found(name, tuple(part.get_shape()), str(part.get_dtype()))
        except FileNotFoundError:
            wrong.append(f"{name} is missing")
        except (SafetensorError, OSError) as error:
            wrong.append(f"{name} is truncated or damaged ({' '.join(str(error).split())})")
    return found, Finding("shards can be read", not wrong, some(wrong) or f"{len(record['shards'])} shards")


def _index(folder: Path, found: Mapping[str, _Found]) -> Finding:
    try:
        weight_map = read_json(folder / INDEX).get("weight_map")
    except ModelError as error:
        return Finding("index", False, str(error))
    if not isinstance(weight_map, dict):
        return Finding("index", False, "it has no weight_map")
    places = {name: tensor.file for name, tensor in found.items()}
    wrong = [
        f"{name} is said to be in {weight_map.get(name, 'no file')} and lies in {places.get(name, 'none')}"
        for name in sorted({*weight_map, *places})
        if weight_map.get(name) != places.get(name)
    ]
    return Finding("index", not wrong, some(wrong) or f"{len(found)} tensors lie where it says")


def _tensors(expected: MergedTensors, found: Mapping[str, _Found], *, is_complete: bool) -> list[Finding]:
    shapes = expected.shapes
    missing, extra = sorted(set(shapes) - set(found)), sorted(set(found) - set(shapes))
    misshapen = [
        f"{name} is {list(found[name].shape)}, expected {list(shapes[name])}"
        for name in shapes
        if name in found and found[name].shape != shapes[name]
    ]
    foreign = [
        f"{name} is {found[name].dtype}, expected {expected.dtype}"
        for name in shapes
        if name in found and STORED.get(found[name].dtype) != expected.dtype
    ]
    because = "" if is_complete else " (a shard cannot be read)"
    return [
        Finding("no tensor missing", not missing, some(missing) + because if missing else f"{len(shapes)} expected"),
        Finding("no tensor too many", not extra, some(extra) or "none"),
        Finding("shapes", not misshapen, some(misshapen) or "as the configuration says"),
        Finding("dtype", not foreign, some(foreign) or f"{expected.dtype} everywhere"),
    ]


def _packed(
    folder: Path, found: dict[str, _Found], expected: MergedTensors, export: str
) -> tuple[dict[str, _Found], dict[str, Packed], list[Finding]]:
    """The tensors as they are after expansion; how those of few bits are stored, and whether all of them are."""
    if export == "safetensors":
        return found, {}, []
    name = f"weights in {export}"
    places = {key: TensorPlace(folder / one.file, key, one.shape, one.dtype) for key, one in found.items()}
    wrong = [f"{key} is not" for key in expected.shapes if is_packed(key) and kind_of(key, places) != export]
    try:
        joined = with_packed(places)
    except ModelError as error:
        return found, {}, [Finding(name, False, str(error))]
    packed = {key: place.packed for key, place in joined.items() if place.packed is not None}
    dtypes = {dtype: stored for stored, dtype in STORED.items()}
    after = {
        key: _Found(place.file.name, place.shape, dtypes[expected.dtype] if key in packed else place.dtype)
        for key, place in joined.items()
    }
    return after, packed, [Finding(name, not wrong, some(wrong) or f"{len(packed)}, with their scales")]


def _official(folder: Path, found: Mapping[str, _Found]) -> Finding:
    """What the official code needs beyond names and an index: its config fields, and all of vision in one file."""
    name = "loads in the official code"
    try:
        fields = read_json(folder / "config.json")
    except ModelError as error:
        return Finding(name, False, str(error))
    wrong = [f"config.json lacks {key}" for key in OFFICIAL_FIELDS if fields.get(key) is None]
    homes = sorted({one.file for key, one in found.items() if key.startswith(_VISION_PARTS)})
    if len(homes) > 1:
        wrong.append(f"projector, mining and towers are divided over {', '.join(homes)}")
    return Finding(name, not wrong, some(wrong) or "names, index and config.json as it wants them")


def _weights(
    folder: Path,
    expected: MergedTensors,
    found: Mapping[str, _Found],
    packed: Mapping[str, Packed],
    on_progress: Callable[[str, int, int], None] | None,
) -> list[Finding]:
    """Values are finite, and what base and adapter give: bit for bit where LoRA adds nothing, else to the last bit."""
    infinite: list[str] = []
    other: list[str] = []
    plain: list[str] = []
    names = [name for name, shape in expected.shapes.items() if name in found and found[name].shape == shape]
    by_file: dict[str, list[str]] = {}
    for name in names:
        by_file.setdefault(found[name].file, []).append(name)
    done = 0
    for file, inside in by_file.items():
        with safe_open(str(folder / file), framework="pt") as handle:
            for name, wanted in expected.read(inside):
                tensor = unpack(packed[name], handle.get_tensor) if name in packed else handle.get_tensor(name)
                if not torch.isfinite(tensor.float()).all():
                    infinite.append(name)
                if name in packed:
                    if _is_nearer_to_base(expected, name, tensor, wanted):
                        plain.append(name)
                    elif not agrees(tensor, wanted, packed[name].kind):
                        other.append(name)
                elif not _agrees(tensor, wanted, is_sum=name in expected.adapted):
                    (plain if _is_base(expected, name, tensor, wanted) else other).append(name)
                done += 1
                if on_progress is not None:
                    on_progress("tensors compared", done, len(names))
    findings = [
        Finding("values are finite", not infinite, some(infinite) or f"{done} tensors"),
        Finding("weights are base + adapter", not other, some(other) or f"{done - len(plain)} tensors"),
    ]
    if expected.adapted:
        count, called = len(expected.adapted), "LoRA" if expected.kind == "lora" else expected.kind
        left = [name for name in plain if name in expected.adapted]
        says = f"in {count} weights (scale {expected.scale:g})"
        if left:
            says = f"not applied to {len(left)} of {count} weights: {some(left)}"
        elif len(expected.idle) == count:
            says = f"it changes nothing: a factor is zero in all {count} weights, first {min(expected.idle)}"
        findings.append(Finding(f"{called} is applied", not left and len(expected.idle) < count, says))
    if expected.replaced:
        left = [name for name in plain if name in expected.replaced]
        says = f"{len(expected.replaced)} tensors"
        if left:
            says = f"{len(left)} of {len(expected.replaced)} are the base's: {some(left)}"
        findings.append(Finding("projector and mining are the run's", not left, says))
    return findings


def _agrees(tensor: Tensor, wanted: Tensor, *, is_sum: bool) -> bool:
    """Equal bits; a sum may end in other last bits, as it was made on another machine or with other threads."""
    if tensor.dtype != wanted.dtype:
        return False
    width = {4: torch.int32, 2: torch.int16}[tensor.element_size()]
    differs = tensor.view(width) != wanted.view(width)
    n_other = int(differs.sum())
    if n_other == 0 or not is_sum:
        return n_other == 0
    distance = (tensor.float() - wanted.float()).abs()
    if tensor.dtype == torch.float32:
        return bool(distance.max() <= 1e-6 * wanted.abs().max())
    # One step of a 16-bit number, and seldom: a whole LoRA may be no more than one step in size
    one_step = torch.finfo(tensor.dtype).eps * wanted.float().abs() + torch.finfo(tensor.dtype).tiny
    return bool((distance <= one_step).all()) and n_other <= 1e-3 * tensor.numel()


def _is_base(expected: MergedTensors, name: str, tensor: Tensor, wanted: Tensor) -> bool:
    if name not in expected.adapted | expected.replaced or tensor.dtype != wanted.dtype:
        return False
    base = expected.base(name)
    return base is not None and torch.equal(tensor, base)


def _is_nearer_to_base(expected: MergedTensors, name: str, tensor: Tensor, wanted: Tensor) -> bool:
    """Whether codes were made of the base's weight: a small LoRA lies within the width of a code."""
    base = expected.base(name) if name in expected.adapted - expected.idle else None
    if base is None:
        return False
    values = tensor.float()
    return float((values - base.float()).abs().sum()) < float((values - wanted.float()).abs().sum())


def _processor(folder: Path) -> list[Finding]:
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    findings = [Finding("files beside the weights", not missing, some([f"{n} is missing" for n in missing]) or "all")]
    try:
        tokenizer = load_processor(folder).tokenizer
        findings.append(Finding("tokenizer", True, f"{len(tokenizer):,} words"))
    except ModelError as error:
        findings.append(Finding("tokenizer", False, str(error)))
    try:
        stops = read_json(folder / "generation_config.json").get("eos_token_id")
        findings.append(Finding("generation config", stops is not None, f"answers end at {json.dumps(stops)}"))
    except ModelError as error:
        findings.append(Finding("generation config", False, str(error)))
    return [*findings, _card(folder)]


def _card(folder: Path) -> Finding:
    try:
        license_name = stated_license(folder)
    except ModelError as error:
        return Finding("model card", False, str(error))
    says = f"license {license_name}" if license_name else "README.md is missing, or its head states no license"
    return Finding("model card", license_name is not None, says)
