"""``mgm-exp merge RUN --out D``: a trained model as one folder that needs nothing else."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from mgm_exp.errors import EXIT_DONE
from mgm_exp.signals import stop_on_signals
from mgm_exp.verbs.arguments import add_base
from mgm_exp.verbs.progress_bar import progress_bar

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def run(arguments: list[str]) -> int:
    """Merges what the arguments name."""
    options = _options(arguments)
    from mgm_exp.model.standalone import merge_run

    with stop_on_signals(), progress_bar() as on_progress:
        merged = merge_run(
            options.run,
            options.out,
            base=options.base,
            dtype=options.dtype,
            shard_bytes=options.shard_size,
            license_name=options.license,
            export=options.export,
            on_progress=on_progress,
        )
    form = merged.dtype if options.export == "safetensors" else f"{merged.dtype} and {options.export}"
    size = f"{merged.n_bytes / 2**30:.3f} GiB of {form} in {merged.shards} shards"
    says = f"{merged.adapted:,} changed by the adapter), {size}"
    if options.export == "peft":
        says = f"an adapter of {merged.adapted:,} weights), {merged.n_bytes / 2**20:.1f} MiB in {merged.shards} files"
    print(f"{merged.tensors:,} tensors ({says}: {options.out}")
    print(f"prove it with: mgm-exp check {options.out}")
    return EXIT_DONE


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mgm-exp merge",
        description="Writes LLM with its adapter, projector, mining and towers under the official names, with "
        "tokenizer, model card and a merge record. One tensor is in memory at a time; DIR appears whole or not at all.",
    )
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="folder of a run, or of an adapter (also of the official code)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new or empty folder")
    add_base(parser, "where RUN does not lead to it")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: as the base stores them)"
    )
    parser.add_argument(
        "--shard-size", type=_size, default=2**30, metavar="SIZE", help="of a file: 500MiB, 4GiB (default: 1GiB)"
    )
    parser.add_argument(
        "--export",
        choices=("safetensors", "peft", "int8", "nf4"),
        default="safetensors",
        help="a standalone model (default); the adapter alone, as PEFT reads it; or a standalone model whose LLM has "
        "linear layers of 8 or 4 bits, made by bitsandbytes on a CUDA GPU",
    )
    parser.add_argument("--license", metavar="NAME", help="for the card (default: what the base's card says)")
    return parser.parse_args(arguments)


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: use 500MiB, 4GiB")
    return size
