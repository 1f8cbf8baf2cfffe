"""Merging a run of a model of transformers into one folder that `AutoModelForImageTextToText` loads, and proving it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mgm_exp.errors import ModelError
from mgm_exp.model.folders import read_json
from mgm_exp.model.hf.loading import build_hf, is_hf_folder, without_bars
from mgm_exp.model.hf.saving import copy_companions, load_hf_adapter
from mgm_exp.store import file_sha256, read_yaml, write_atomic, write_json_atomic

FAMILY = "hf"


@dataclass(frozen=True)
class HfRun:
    """What a run of such a model consists of.

    Args:
        folder: The run's, or an adapter's.
        base: The folder that training started from; None: it is not needed (all weights were written).
        adapter: LoRA's folder; None: all weights were trained.
        model: Folder of all weights; None: there is an adapter.
    """

    folder: Path
    base: Path | None
    adapter: Path | None
    model: Path | None


def hf_run(run: Path, base: str | Path | None = None) -> HfRun | None:
    """The parts of a run or adapter folder of a model of transformers; None: it is something else (MGM).

    Raises:
        ModelError: it is such a run, and its base is not there.
    """
    given = Path(base).expanduser() if base is not None else None
    if (run / "adapter_config.json").is_file():
        named = (
            given or Path(str(read_json(run / "adapter_config.json").get("base_model_name_or_path") or "")).expanduser()
        )
        return HfRun(run, named, run, None) if is_hf_folder(named) else None
    section = _section(run)
    if section.get("family") != FAMILY:
        return None
    base_folder = given or Path(str(section.get("path"))).expanduser()
    if (run / "model" / "config.json").is_file():
        return HfRun(run, base_folder if base_folder.is_dir() else None, None, run / "model")
    if not (run / "adapter" / "adapter_config.json").is_file():
        raise ModelError(
            f"Run folder {str(run)!r} holds neither model/ nor adapter/.", advice="Let the run finish first."
        )
    if not is_hf_folder(base_folder):
        raise ModelError(f"The base model of {run} is not in {base_folder}.", advice="Give it with --base.")
    return HfRun(run, base_folder, run / "adapter", None)


def load_hf_run(parts: HfRun, *, device: str = "cpu", dtype: str | None = None) -> Any:
    """The trained model, with its adapter beside the weights."""
    folder = parts.model or parts.base
    model, _ = build_hf({"path": str(folder)}, device=device, dtype=dtype)
    if parts.adapter is not None:
        load_hf_adapter(model, parts.adapter)
    return model


def merge_hf(
    parts: HfRun, partial: Path, out: Path, *, dtype: str | None, shard_bytes: int, license_name: str | None = None
) -> dict[str, Any]:
    """Writes the merged model into ``partial``, which becomes ``out``; the whole model is in memory meanwhile.

    Returns:
        ``{tensors, adapted, shards, n_bytes, dtype}``.
    """
    source = parts.model or parts.base
    assert source is not None
    kept = dtype or _stored_dtype(source)
    model: Any = build_hf({"path": str(source)}, device="cpu", dtype=kept)[0]
    names = {name for name, _ in model.named_parameters()}
    adapted = 0
    if parts.adapter is not None:
        from peft import PeftModel

        from mgm_exp.model.adapters import read_adapter_config

        read_adapter_config(parts.adapter)  # refuses what PEFT would import a module for
        wrapped = PeftModel.from_pretrained(model, str(parts.adapter))
        adapted = sum(".lora_A." in name for name, _ in wrapped.named_parameters())
        model = wrapped.merge_and_unload(safe_merge=True)
    with without_bars():
        model.save_pretrained(str(partial), max_shard_size=shard_bytes)
    copy_companions(source, partial)
    facts = {
        n: read_json(parts.folder / f"{n}.json") if (parts.folder / f"{n}.json").is_file() else {}
        for n in ("result", "manifest")
    }
    write_atomic(partial / "README.md", _card(facts, (parts.base or source).name, parts, license_name))
    shards = sorted(path.name for path in partial.glob("*.safetensors"))
    others = sorted(p.name for p in partial.iterdir() if p.name not in ("lock", "unfinished.json", *shards))
    write_json_atomic(
        partial / "merge.json",
        {
            "schema_version": 1,
            "family": FAMILY,
            "kind": "full" if parts.adapter is None else "lora",
            "dtype": kept,
            "base": {"name": (parts.base or source).name, "folder": _relative(parts.base, out)},
            "run": {"id": facts["result"].get("run_id"), "folder": _relative(parts.folder, out)},
            "n_tensors": len(names),
            "lora": {"weights": adapted},
            "shards": {name: file_sha256(partial / name) for name in shards},
            "files": {name: file_sha256(partial / name) for name in others},
        },
    )
    n_bytes = sum((partial / name).stat().st_size for name in shards)
    return {"tensors": len(names), "adapted": adapted, "shards": len(shards), "n_bytes": n_bytes, "dtype": kept}


def _section(run: Path) -> dict[str, Any]:
    try:
        return dict(read_yaml(run / "config.yaml")["model"])
    except (OSError, KeyError, TypeError, ValueError):
        return {}


def _stored_dtype(folder: Path) -> str:
    stated = read_json(folder / "config.json")
    return str(stated.get("dtype") or stated.get("torch_dtype") or "float32").removeprefix("torch.")


def _relative(path: Path | None, out: Path) -> str | None:
    return os.path.relpath(path.absolute(), out) if path is not None else None


def _card(facts: Mapping[str, Mapping[str, Any]], base: str, parts: HfRun, license_name: str | None) -> str:
    from mgm_exp.model.card import stated_license

    stated = license_name or (stated_license(parts.base) if parts.base is not None else None)
    head: dict[str, Any] = {"license": stated or "other", "base_model": base, "pipeline_tag": "image-text-to-text"}
    if stated is None:
        head["license_name"] = "that-of-the-base-model"
    head |= {"library_name": "transformers", "tags": ["full-fine-tuning" if parts.adapter is None else "lora"]}
    metrics = dict(facts["result"].get("metrics") or {})
    data = facts["manifest"].get("data") or {}
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip(),
        "---",
        f"# {base} fine-tuned",
        "",
    ]
    lines += ["```python", "from transformers import AutoModelForImageTextToText, AutoProcessor", ""]
    lines += ['model = AutoModelForImageTextToText.from_pretrained("FOLDER")', "```", "", f"- Base model: {base}"]
    if data:
        lines.append(f"- Data: {data.get('name')}, {data.get('n_train')} rows of training")
    lines += ["", "## Scores", ""]
    lines += ["| metric | value |", "| --- | --- |"] if metrics else ["It was not evaluated."]
    lines += [f"| {name} | {value} |" for name, value in sorted(metrics.items())]
    lines += ["", "The license of the base model holds." if stated is None else f"License: {stated}."]
    return "\n".join(lines) + "\n"
