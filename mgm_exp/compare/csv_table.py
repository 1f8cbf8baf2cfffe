"""The comparison as CSV: a line for each arm and benchmark, numbers as they are, for pandas or a spreadsheet."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mgm_exp.compare.differences import shown
from mgm_exp.compare.table import mean_of
from mgm_exp.store import write_atomic

Comparison = Mapping[str, Any]

_PAIR = (
    "difference",
    "ci_low",
    "ci_high",
    "p_value",
    "p_by_image",
    "p_adjusted",
    "p_discovery",
    "standard_error",
    "seed_error",
    "gained",
    "lost",
    "test",
    "verdict",
)
_ARM = ("benchmark", "arm", "run_dir", "seeds", "status", "cause", "is_baseline")
_SCORE = ("accuracy", "accuracy_low", "accuracy_high", "n", "seed_sd", "group")
_COST = ("n_lora", "n_other", "n_total", "train_tokens_per_s", "peak_memory_gib", "wall_s")


def csv_text(comparison: Comparison) -> str:
    """The lines; what differs between runs are the last columns, each named as its configuration key."""
    keys = list(dict.fromkeys(key for run in comparison["runs"] for key in run["differs"] if key != "seed"))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    pair_names = [name if name not in ("ci_low", "ci_high") else f"difference_{name[3:]}" for name in _PAIR]
    writer.writerow([*_ARM, *_SCORE, *pair_names, *_COST, *keys])
    runs = {run["run_dir"]: run for run in comparison["runs"]}
    pairs = {
        (pair["b"], pair["benchmark"]): pair for pair in comparison["pairs"] if pair["a"] == comparison["baseline"]
    }
    for benchmark in comparison["benchmarks"] or [None]:
        letters = (comparison["groups"].get(benchmark) or {}).get("letters", {})
        for arm in comparison["arms"]:
            own = [runs[name] for name in arm["runs"]]
            score = arm["metrics"].get(f"{benchmark}/accuracy") or {}
            pair = pairs.get((arm["id"], benchmark)) or {}
            first = runs[arm["id"]]
            writer.writerow(
                map(
                    _cell,
                    [
                        benchmark,
                        arm["label"],
                        arm["id"],
                        " ".join(str(seed) for seed in arm["seeds"]),
                        arm["status"],
                        first["cause"],
                        arm["id"] == comparison["baseline"],
                        *(score.get(name) for name in ("value", "ci_low", "ci_high", "n", "seed_sd")),
                        letters.get(arm["id"]),
                        *(pair.get(name) for name in _PAIR),
                        *(first["trainable"].get(name) for name in _COST[:3]),
                        *(mean_of(own, name) for name in _COST[3:]),
                        *(None if key not in first["differs"] else shown(first["differs"][key]) for key in keys),
                    ],
                )
            )
    return out.getvalue()


def _cell(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula is quoted; numbers are left as they are."""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        return value
    is_number = value.replace(".", "", 1).replace("e-", "", 1).lstrip("-").isdecimal()
    return f"'{value}" if value[:1] in ("=", "+", "-", "@", "\t", "\r") and not is_number else value


def write_csv(comparison: Comparison, path: Path | str) -> Path:
    """Writes the lines."""
    write_atomic(Path(path), csv_text(comparison))
    return Path(path)
