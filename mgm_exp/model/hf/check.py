"""Proves that a merged model of transformers is whole, and gives the logits of its base with the adapter."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from mgm_exp.errors import MgmError, ModelError
from mgm_exp.model.check import files_as_written, headers_of
from mgm_exp.model.finding import Finding, some
from mgm_exp.model.hf.loading import build_hf, open_processor
from mgm_exp.model.hf.loss import model_inputs
from mgm_exp.model.hf.merge import HfRun, hf_run, load_hf_run
from mgm_exp.model.logits_check import OF_LOGITS, QUESTIONS, TOLERANCES, without_logits


def check_hf_merged(
    folder: Path,
    record: Mapping[str, Any],
    *,
    run: str | Path | None,
    base: str | Path | None,
    pictures: Sequence[Image.Image] | None,
    device: str = "cpu",
) -> list[Finding]:
    """As :func:`mgm_exp.model.check.check_merged`, for a model of transformers.

    Args:
        pictures: To compare logits on; None: no model is loaded, and the folder is not wholly proven.

    Raises:
        ModelError: its base or run cannot be found.
    """
    findings = files_as_written(folder, record)
    found, readable = headers_of(folder, record)
    findings.append(readable)
    parts = _parts(folder, record, run, base)
    if readable.holds:
        findings.append(_finite(folder, sorted({tensor.file for tensor in found.values()})))
    if pictures is None:
        return [*findings, without_logits()]
    try:
        merged, read = build_hf({"path": str(folder), "attn_implementation": "eager"}, device=device, dtype="float32")
        open_processor(folder)
    except MgmError as error:
        return [*findings, Finding("it loads", False, str(error))]
    findings.append(Finding("it loads", True, f"{type(merged).__name__} with its processor"))
    findings.append(Finding("no tensor too many", not read["unexpected"], some(read["unexpected"]) or "none"))
    findings.append(_logits(folder, merged, parts, record, pictures, device))
    return findings


def _parts(folder: Path, record: Mapping[str, Any], run: str | Path | None, base: str | Path | None) -> HfRun:
    def place(section: str) -> Path | None:
        given = record[section].get("folder")
        return Path(os.path.normpath(folder.absolute() / given)) if given else None

    there = Path(run).expanduser() if run is not None else place("run")
    if there is None or not there.is_dir():
        raise ModelError(
            f"{folder / 'merge.json'} names {there}, which does not exist.", advice="Say where with --run."
        )
    found = hf_run(there, base or place("base"))
    if found is None:
        raise ModelError(
            f"{there} is no run of a model of transformers, or its base is not there.", advice="Give --base."
        )
    return found


def _finite(folder: Path, files: Sequence[str]) -> Finding:
    wrong, count = [], 0
    for file in files:
        with safe_open(str(folder / file), framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a dict
                count += 1
                if not torch.isfinite(handle.get_tensor(name).float()).all():
                    wrong.append(name)
    return Finding("values are finite", not wrong, "; ".join(wrong[:3]) or f"{count} tensors")


def _logits(
    folder: Path, merged: Any, parts: HfRun, record: Mapping[str, Any], pictures: Sequence[Image.Image], device: str
) -> Finding:
    here = logits_of(merged, folder, pictures)
    there = logits_of(load_hf_run(parts, device=device, dtype="float32"), parts.model or parts.base or folder, pictures)
    if here.shape != there.shape:
        return Finding(
            OF_LOGITS, False, "the two give sequences of different length: other tokenizer or image settings"
        )
    largest, spread = float((here - there).abs().max()), float(there.std())
    limit = TOLERANCES[record["dtype"]] * spread
    says = f"differ by at most {largest:.2g}; allowed {limit:.2g} ({record['dtype']}), standard deviation {spread:.2g}"
    if parts.adapter is not None:
        plain, _ = build_hf({"path": str(parts.base)}, device=device, dtype="float32")
        says += f"; without LoRA {float((logits_of(plain, folder, pictures) - there).abs().max()):.2g}"
    return Finding(OF_LOGITS, math.isfinite(largest) and largest <= limit, f"{len(pictures)} pictures: {says}")


@torch.no_grad()
def logits_of(model: Any, folder: Path, pictures: Sequence[Image.Image]) -> Tensor:
    """Logits (N, vocabulary) of a question about each picture, one row a token."""
    processor = open_processor(folder)
    rows = []
    for number, picture in enumerate(pictures):
        batch = processor.prompts([QUESTIONS[number % len(QUESTIONS)]], [picture])
        inputs = model_inputs(model, {key: value.to(model.device) for key, value in batch.items()})
        rows.append(model(**inputs, use_cache=False).logits[0].float().cpu())
    return torch.cat(rows)
