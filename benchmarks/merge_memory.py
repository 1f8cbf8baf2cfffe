"""Memory of a merge above that of the process itself, for models of several sizes: ours, and PEFT's.

Ours is ``merge_run`` (base, LoRA and connector, shard by shard); the peer loads the base, puts the same LoRA on it,
merges it (``merge_and_unload``) and saves (``save_pretrained``). Each is a process of its own: highest resident memory,
less what is resident once everything is imported and used once. Models are the tiny one made wider, with random weights
in fp32; shards are 32 MiB. Pages of the files that are read count as resident, though the system may drop them.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measurement import Row

SHARD_MIB = 32
CONSTANT_MIB = 32
"""For tables of names, the record, hashes and what the allocator keeps."""
WIDTHS, WIDTHS_QUICK = (128, 256, 512), (64, 128)
"""Hidden sizes; layers are eight times as many as the tiny model's."""
LAYERS = 16


@dataclass(frozen=True)
class Found:
    """Peak above the process, in MiB, of both; sizes of model and adapter, and how far the results are apart."""

    model: float
    adapter: float
    ours: float
    peer: float
    difference: float


def run(work: Path, quick: bool) -> list[Row]:
    """Merges each size in both ways."""
    found = [_measure(work / str(width), width) for width in (WIDTHS_QUICK if quick else WIDTHS)]
    last = found[-1]
    shown = "; ".join(f"model {one.model:.0f}: ours {one.ours:.0f}, PEFT {one.peer:.0f}" for one in found)
    growth = last.ours - found[0].ours
    bound = SHARD_MIB + last.adapter + CONSTANT_MIB
    within = "within" if last.ours <= bound else "ABOVE"
    difference = max(one.difference for one in found)
    return [
        Row(
            f"memory of merging LoRA into a model of {last.model:.0f} MiB",
            "MiB",
            max(last.ours, 0.1),
            last.peer,
            # What is wanted: no more than a shard, the adapter and a constant, whatever the size of the model.
            last.peer / bound,
            f"{within} a shard of {SHARD_MIB} MiB, the adapter's {last.adapter:.0f} and {CONSTANT_MIB}; "
            f"weights differ by at most {difference:.1g}" + ("" if difference <= 1e-5 else ": they DIFFER"),
            f"highest resident memory less that of the process with everything imported, MiB: {shown}; "
            f"{growth:+.0f} MiB from the smallest to the largest",
        )
    ]


def _measure(folder: Path, width: int) -> Found:
    folder.mkdir(parents=True)
    _process("make", folder, str(width))
    ours, peer = (float(_process(way, folder)) for way in ("ours", "peer"))
    difference = float(_process("compare", folder))
    size, adapter = (
        sum(file.stat().st_size for file in (folder / place).glob("*.safetensors")) / 2**20
        for place in ("base", "run/adapter")
    )
    shutil.rmtree(folder)
    return Found(size, adapter, ours, peer, difference)


def _process(*arguments: str | Path) -> str:
    command = [sys.executable, "-m", "benchmarks.merge_memory", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]


# -- what a process does -----------------------------------------------------------------------------------------------


def _make(folder: Path, width: int) -> float:
    """A base of random weights, and a run with a LoRA for all its linear layers."""
    import torch

    from mgm_exp.model import MGMForConditionalGeneration, apply_adapter, load_model, save_adapter, save_full
    from mgm_exp.model.folders import TINY

    config = load_model(TINY).config
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = width, 4 * width, LAYERS
    config.dtype = torch.float32
    torch.manual_seed(0)
    model = MGMForConditionalGeneration(config)
    model.source_folder = str(TINY)
    save_full(model, folder / "base")
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    apply_adapter(model, {"kind": "lora", "rank": 16, "alpha": 32, "dropout": 0.0, "target_modules": modules}, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.02)
    save_adapter(model, folder / "run" / "adapter")
    (folder / "run" / "config.yaml").write_text(json.dumps({"model": {"name": "wide", "path": str(folder / "base")}}))
    return 0.0


def _ours(folder: Path) -> float:
    from mgm_exp.model.standalone import merge_run

    _use_everything_once()
    before = _resident_mib()
    merge_run(folder / "run", folder / "ours", shard_bytes=SHARD_MIB * 2**20)
    return _peak_mib() - before


def _peer(folder: Path) -> float:
    import peft

    from mgm_exp.model import load_model

    _use_everything_once()
    before = _resident_mib()
    base = load_model(folder / "base")
    merged = peft.PeftModel.from_pretrained(base, str(folder / "run" / "adapter")).merge_and_unload()
    merged.save_pretrained(str(folder / "peer"), max_shard_size=f"{SHARD_MIB}MB")
    return _peak_mib() - before


def _use_everything_once() -> None:
    """Imports what is imported on first use, in both processes alike."""
    from transformers import GenerationConfig

    from mgm_exp.model import load_model
    from mgm_exp.model.folders import TINY

    GenerationConfig()
    load_model(TINY)


def _compare(folder: Path) -> float:
    """Largest difference of a merged weight; ours holds the same tensors, by the official names."""
    from safetensors import safe_open

    from mgm_exp.model.tensors import checkpoint_name, tensor_map

    theirs = {checkpoint_name(name): place for name, place in tensor_map(folder / "peer").items()}
    largest = 0.0
    for name, place in tensor_map(folder / "ours").items():
        tensors = []
        for one in (place, theirs[name]):
            with safe_open(str(one.file), framework="pt") as handle:
                tensors.append(handle.get_tensor(one.key))
        largest = max(largest, float((tensors[0] - tensors[1]).abs().max()))
    return largest


def _resident_mib() -> float:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    way, place, *rest = sys.argv[1:]
    if way == "make":
        print(_make(Path(place), int(rest[0])))
    else:
        print({"ours": _ours, "peer": _peer, "compare": _compare}[way](Path(place)))
