"""Proves that a merged folder is whole and equal to its base and adapter; names what is wrong where it is not.

Files are compared with the merge record, tensors with the configuration, weights with base and adapter
added anew, and logits of both on pictures and questions that go through the processor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mgm_exp.errors import ModelError
from mgm_exp.model.adapters import load_adapter
from mgm_exp.model.folders import ModelSource, find_source, read_json
from mgm_exp.model.loading import load_source
from mgm_exp.model.merged_tensors import STORED, MergedTensors
from mgm_exp.model.mgm import MGMForConditionalGeneration
from mgm_exp.model.processor import MGMProcessor, load_processor, processor_of
from mgm_exp.model.standalone import INDEX, RECORD, SCHEMA_VERSION, adapter_fingerprints, recorded_source, source_of_run
from mgm_exp.store import file_sha256

# Largest difference of logits, as a share of their standard deviation. Both models compute in fp32, so what differs is
# that the merged weights were rounded to the folder's dtype and LoRA's product was not.
TOLERANCES = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1.5e-1}
QUESTIONS = ("What is in the picture?", "Read the text on the sign.", "Which colour is the larger shape?")
_NEEDED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: `name`, whether it `holds` (None: could not be looked at), and what was seen."""

    name: str
    holds: bool | None
    says: str


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
    on_progress: Callable[[str, int, int], None] | None = None,
) -> list[Finding]:
    """Looks at everything; the folder is proven when every finding holds.

    Args:
        folder: written by `merge_run`.
        run: where the run is now, if it is not where the record says.
        base: where the base is now, likewise.
        images: pictures to compare logits on; none: three that are drawn.
        device: for the logits; both models compute in fp32, one after the other.
        on_progress: called with (what, tensors compared, tensors in all).

    Raises:
        ModelError: no merged folder, or its base or adapter cannot be found.
    """
    folder = Path(folder).expanduser()
    record = read_record(folder)
    if record.get("family") == "hf":
        from mgm_exp.model.hf.check import check_hf_merged

        opened = [_opened(path) for path in images]
        return check_hf_merged(folder, record, run=run, base=base, pictures=opened, device=device)
    source = _source(folder, record, run, base)
    expected = MergedTensors(source, record["dtype"])
    findings = [_adapter(source, record)]
    findings += _files(folder, record)
    found, damaged = _headers(folder, record)
    findings += [damaged, _index(folder, found)]
    findings += _tensors(expected, found, is_complete=damaged.holds is True)
    findings += _weights(folder, expected, found, on_progress)
    findings += _processor(folder)
    findings.append(_logits(folder, source, record, images, device))
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
    return record


def drawn_pictures() -> list[Image.Image]:
    """Three small pictures that are the same everywhere: shapes and bars on a slope of colours."""
    pictures = []
    for number, (width, height) in enumerate([(320, 240), (200, 300), (256, 256)]):
        slope = Image.linear_gradient("L").resize((width, height))
        picture = Image.merge("RGB", (slope, slope.rotate(180), Image.new("L", (width, height), 80 + 60 * number)))
        draw = ImageDraw.Draw(picture)
        draw.ellipse((20, 20, 120, 140), fill=(200, 30, 40 + 70 * number))
        draw.rectangle((90, 90, 180, 200), fill=(20, 60 + 60 * number, 220))
        for bar in range(3 + number):
            draw.line((30 + 15 * bar, 150, 40 + 15 * bar, 220), fill=(255, 255, 255), width=4)
        pictures.append(picture)
    return pictures


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


def _files(folder: Path, record: Mapping[str, Any]) -> list[Finding]:
    findings = []
    for what, names in (("SHA-256 of shards", record["shards"]), ("SHA-256 of other files", record["files"])):
        missing = [name for name in names if not (folder / name).is_file()]
        changed = [n for n in names if n not in missing and file_sha256(folder / n) != names[n]]
        wrong = [f"{name} is missing" for name in missing] + [f"bytes of {name} changed" for name in changed]
        findings.append(Finding(what, not wrong, _some(wrong) or f"{len(names)} files as they were written"))
    return findings


def _headers(folder: Path, record: Mapping[str, Any]) -> tuple[dict[str, _Found], Finding]:
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
    return found, Finding("shards can be read", not wrong, _some(wrong) or f"{len(record['shards'])} shards")


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
    return Finding("index", not wrong, _some(wrong) or f"{len(found)} tensors lie where it says")


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
        Finding("no tensor missing", not missing, _some(missing) + because if missing else f"{len(shapes)} expected"),
        Finding("no tensor too many", not extra, _some(extra) or "none"),
        Finding("shapes", not misshapen, _some(misshapen) or "as the configuration says"),
        Finding("dtype", not foreign, _some(foreign) or f"{expected.dtype} everywhere"),
    ]


def _weights(
    folder: Path,
    expected: MergedTensors,
    found: Mapping[str, _Found],
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
                tensor = handle.get_tensor(name)
                if not torch.isfinite(tensor.float()).all():
                    infinite.append(name)
                if not _agrees(tensor, wanted, is_sum=name in expected.adapted):
                    (plain if _is_base(expected, name, tensor, wanted) else other).append(name)
                done += 1
                if on_progress is not None:
                    on_progress("tensors compared", done, len(names))
    findings = [
        Finding("values are finite", not infinite, _some(infinite) or f"{done} tensors"),
        Finding("weights are base + adapter", not other, _some(other) or f"{done - len(plain)} tensors"),
    ]
    if expected.adapted:
        says = f"in {len(expected.adapted)} weights (scale {expected.scale:g})"
        not_applied = f"not applied to {len(plain)} of {len(expected.adapted)} weights: {_some(plain)}"
        findings.append(Finding("LoRA is applied", not plain, not_applied if plain else says))
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
    return name in expected.adapted and tensor.dtype == wanted.dtype and torch.equal(tensor, expected.base(name))


def _processor(folder: Path) -> list[Finding]:
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    findings = [Finding("files beside the weights", not missing, _some([f"{n} is missing" for n in missing]) or "all")]
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
    return findings


def _logits(
    folder: Path, source: ModelSource, record: Mapping[str, Any], images: Sequence[Path], device: str
) -> Finding:
    name = "logits of merged and base + adapter"
    pictures = [_opened(path) for path in images] or drawn_pictures()
    try:
        merged = load_source(ModelSource(folder), device=device, dtype="float32", attn_implementation="eager")
        here = _answers(merged, load_processor(folder), pictures)
    except ModelError as error:
        return Finding(name, None, f"the folder does not load: {error}")
    del merged
    plain = replace(source, adapter=None)
    model = load_source(plain, device=device, dtype="float32", attn_implementation="eager")
    if source.adapter is not None:
        load_adapter(model, source.adapter).float()  # an old adapter of 16 bits would compute in 16 bits
    there = _answers(model, processor_of(plain), pictures)
    if any(a.shape != b.shape for a, b in zip(here, there, strict=True)):
        return Finding(name, False, "the two give sequences of different length: other tokenizer or image settings")
    spread = float(torch.cat([t.flatten() for t in there]).std())
    largest = max(float((a - b).abs().max()) for a, b in zip(here, there, strict=True))
    limit = TOLERANCES[record["dtype"]] * spread
    says = f"differ by at most {largest:.2g}; allowed {limit:.2g} ({record['dtype']}), standard deviation {spread:.2g}"
    if source.adapter is not None:
        for module in model.modules():
            if isinstance(scaling := getattr(module, "scaling", None), dict):
                scaling.update(dict.fromkeys(scaling, 0.0))
        [without] = _answers(model, processor_of(plain), pictures[:1])
        says += f"; without LoRA {float((without - there[0]).abs().max()):.2g}"
    return Finding(name, math.isfinite(largest) and largest <= limit, f"{len(pictures)} pictures: {says}")


@torch.no_grad()
def _answers(
    model: MGMForConditionalGeneration, processor: MGMProcessor, pictures: Sequence[Image.Image]
) -> list[Tensor]:
    """Logits (1, L, vocabulary) of a question about each picture."""
    out = []
    for number, picture in enumerate(pictures):
        ids = torch.tensor([processor.encode_prompt(QUESTIONS[number % len(QUESTIONS)])], device=model.device)
        image, image_aux = (part[None].to(model.device) for part in processor.pixels(picture))
        out.append(model(input_ids=ids, images=image, images_aux=image_aux).logits.float().cpu())
    return out


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise ModelError(f"{path} cannot be opened as an image: {error}") from error


def _some(names: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return "; ".join(names[:3]) + more
