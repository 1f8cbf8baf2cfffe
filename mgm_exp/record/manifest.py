"""``manifest.json`` and ``result.json``: what other programs read of a run, with their keys checked before writing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mgm_exp.record.secrets import redact
from mgm_exp.store import write_json_atomic

SCHEMA_VERSION = 1
STATUSES = ("completed", "failed", "pruned", "paused", "interrupted")

_MANIFEST = (
    "run_id config_hash command git packages python platform device seed stages data model trainable "
    "started_at ended_at"
).split()
_SECTIONS = {
    "git": "commit dirty diff".split(),
    "data": "name fingerprint n_train".split(),
    "model": "name fingerprint n_parameters".split(),
    "trainable": "n_lora n_other n_total patterns".split(),
}
_STAGE = "name key reused seconds".split()
_RESULT = (
    "run_id status metrics eval_keys objective steps wall_s train_tokens_per_s peak_memory_gib trainable_parameters "
    "error"
).split()
_ERROR = "type message cause advice".split()


def write_manifest(run_dir: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Writes ``manifest.json``: what ran, on what, from what. It may be written again while the run goes on.

    Args:
        run_dir: The run folder.
        manifest: ``run_id, config_hash, command, git{commit,dirty,diff}, packages, python, platform, device, seed,
            stages[{name,key,reused,seconds}], data{name,fingerprint,n_train}, model{name,fingerprint,n_parameters},
            trainable{n_lora,n_other,n_total,patterns}, started_at, ended_at``. Other keys are kept.

    Returns:
        What was written: secrets are masked, numbers that are not finite are null.

    Raises:
        ValueError: a key is missing, or the trainable parameters do not add up.
    """
    _need(manifest, _MANIFEST, "manifest")
    for section, keys in _SECTIONS.items():
        _need(manifest[section], keys, f"manifest.{section}")
    for stage in manifest["stages"]:
        _need(stage, _STAGE, "manifest.stages[]")
    trainable = manifest["trainable"]
    if trainable["n_lora"] + trainable["n_other"] != trainable["n_total"]:
        raise ValueError(
            f"manifest.trainable: n_lora={trainable['n_lora']} + n_other={trainable['n_other']} is not "
            f"n_total={trainable['n_total']}."
        )
    return _write(run_dir / "manifest.json", manifest)


def empty_result(run_id: str, status: str, error: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """``result.json`` of what trained and scored nothing (yet): all keys that :func:`write_result` wants."""
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": run_id,
        "status": status,
        "metrics": {},
        "eval_keys": {},
        "objective": None,
        "steps": 0,
        "wall_s": 0.0,
        "train_tokens_per_s": None,
        "peak_memory_gib": None,
        "trainable_parameters": None,
        "error": error,
    }


def write_result(run_dir: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """Writes ``result.json``: how the run ended and what it scored.

    Args:
        run_dir: The run folder.
        result: ``run_id, status, metrics, eval_keys, objective, steps, wall_s, train_tokens_per_s, peak_memory_gib,
            trainable_parameters, error{type,message,cause,advice} or null``. Other keys are kept.

    Returns:
        What was written: secrets are masked, numbers that are not finite are null.

    Raises:
        ValueError: a key is missing, the status is unknown, a failed run gives no cause or a completed one scores
            something that is not a number.
    """
    _need(result, _RESULT, "result")
    if result["status"] not in STATUSES:
        raise ValueError(f"result.status={result['status']!r}; allowed are {list(STATUSES)}.")
    if result["status"] == "failed" or result["error"] is not None:
        _need(result["error"] or {}, _ERROR, "result.error")
    if result["status"] == "completed":
        unscored = [name for name, value in result["metrics"].items() if not math.isfinite(value)]
        if unscored:
            raise ValueError(f"result.metrics of a completed run are not finite: {unscored}.")
    return _write(run_dir / "result.json", result)


def _need(mapping: Mapping[str, Any], keys: Iterable[str], where: str) -> None:
    missing = [key for key in keys if key not in mapping]
    if missing:
        raise ValueError(f"{where}: the keys {missing} are missing.")


def _write(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    written = _finite(redact({"schema_version": SCHEMA_VERSION, **content}))
    write_json_atomic(path, written)
    return written


def _finite(obj: Any) -> Any:
    if isinstance(obj, float) and not math.isfinite(obj):
        return None
    if isinstance(obj, dict):
        return {key: _finite(value) for key, value in obj.items()}
    if isinstance(obj, list):
        return [_finite(value) for value in obj]
    return obj
