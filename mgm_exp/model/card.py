"""The model card of a merged model: README.md in the form that the Hub reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mgm_exp.errors import ModelError
from mgm_exp.model.merged_tensors import MergedTensors
from mgm_exp.store import parse_yaml


def model_card(
    facts: Mapping[str, Mapping[str, Any]],
    base_name: str,
    base: Path,
    merged: MergedTensors,
    license_name: str | None,
) -> str:
    """README.md with metadata, metrics, data and base; nothing of the machine it was made on.

    Args:
        facts: `result` and `manifest`, as the run's files have them; empty where there are none.
        base_name: of the base model.
        base: its folder, whose own card may state the license.
        license_name: as the Hub spells it; None: the base's.
    """
    result, manifest = facts["result"], facts["manifest"]
    stated = license_name or stated_license(base)
    title = f"{base_name} fine-tuned"
    metrics = {k: v for k, v in dict(result.get("metrics") or {}).items() if _is_number(v)}
    head: dict[str, Any] = {
        "license": stated or "other",
        "base_model": base_name,
        "pipeline_tag": "image-text-to-text",
        "library_name": "mgm_exp",
        "tags": ["mgm", merged.kind or "full-fine-tuning"],
    }
    if stated is None:
        head["license_name"] = "that-of-the-base-model"
    scores = {k: v for k, v in metrics.items() if k.endswith("/accuracy")}
    if scores:
        head["model-index"] = [{"name": title, "results": [_hub_result(k, v) for k, v in scores.items()]}]
    training = "full fine-tuning"
    if merged.kind is not None:
        called = "LoRA" if merged.kind == "lora" else merged.kind
        scale = f", merged (scale {merged.scale:g})" if merged.scale else ", put in their places"
        training = f"{called} on {merged.n_changed} weights{scale}"
    n_parameters = sum(math.prod(shape) for shape in merged.shapes.values())
    lines = ["---", yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip(), "---", f"# {title}", ""]
    lines += [
        f"MGM (Mini-Gemini) with {n_parameters:,} parameters in {merged.dtype}, one standalone folder: LLM, projector, "
        "patch info mining and both vision towers by the official tensor names.",
        "",
        "```python",
        "from mgm_exp.model import load_model, load_processor",
        "",
        'model, processor = load_model("FOLDER"), load_processor("FOLDER")',
        "```",
        "",
        "## How it was made",
        "",
        f"- Base model: {_text(base_name)}",
        f"- Training: {training}",
    ]
    data = manifest.get("data") or {}
    if data:
        lines.append(f"- Data: {_text(data.get('name'))}, {data.get('n_train')} rows of training")
        lines.append(f"- Fingerprint of the data: `{_text(data.get('fingerprint'))}`")
    if result:
        lines.append(
            f"- Run: `{_text(result.get('run_id'))}`, {_text(result.get('status'))}, {result.get('steps')} steps"
        )
    lines += ["", "## Scores", ""]
    if metrics:
        lines += ["| metric | value |", "| --- | --- |"]
        lines += [f"| {_text(name)} | {value:g} |" for name, value in sorted(metrics.items())]
        for name, key in sorted(dict(result.get("eval_keys") or {}).items()):
            lines.append("")
            lines.append(f"{_text(name)}: " + ", ".join(f"{_text(k)} {_text(v)}" for k, v in dict(key).items()) + ".")
    else:
        lines.append("It was not evaluated.")
    lines += [
        "",
        "## License",
        "",
        f"{_text(stated)}." if stated else "The license of the base model applies; it states none in its folder.",
        "Terms of the base model, its vision towers and the training data hold beside it.",
    ]
    return "\n".join(lines) + "\n"


def stated_license(folder: Path) -> str | None:
    """`license` of a model folder's own card; None if it has none.

    Raises:
        ModelError: the card's head is not YAML.
    """
    card = folder / "README.md"
    if not card.is_file():
        return None
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        head = parse_yaml(parts[1])
    except ValueError as error:
        raise ModelError(f"The head of {card} is not YAML: {error}", advice="Correct it, or give --license.") from error
    found = head.get("license") if isinstance(head, dict) else None
    return str(found) if found else None


def _hub_result(metric: str, value: float) -> dict[str, Any]:
    benchmark, _, kind = metric.partition("/")
    return {
        "task": {"type": "visual-question-answering"},
        "dataset": {"name": benchmark, "type": benchmark},
        "metrics": [{"type": kind, "name": metric, "value": value}],
    }


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _text(value: object) -> str:
    """One line that breaks no table."""
    return " ".join(str(value).split()).replace("|", "\\|")
