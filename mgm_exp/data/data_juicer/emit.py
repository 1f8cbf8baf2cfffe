"""Data-Juicer's own recipe files, for running it here and for running it by hand.

    write_recipe(out, pairs, images, operators, limits)
    cd out && HF_HUB_OFFLINE=1 dj-process --config recipe.yaml      # writes recipe_out/kept.jsonl: the same rows

Operators on captions read the column ``caption``: the column ``text`` holds Data-Juicer's special tokens, which its
operators would count. Operators on image and text read ``text``, where the tokens say which image belongs to what.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from mgm_exp.data.data_juicer.image_files import image_files
from mgm_exp.data.data_juicer.operators import Limits, Operator
from mgm_exp.data.data_juicer.pairs import Pair, read_pairs
from mgm_exp.data.formats import DJ_END, DJ_IMAGE
from mgm_exp.store import disk_full_named, write_atomic

RECIPE, RECIPE_PAIRS = "recipe.yaml", "recipe_pairs.parquet"
RECIPE_IMAGES, RECIPE_OUT = "recipe_images", "recipe_out"

STATS = "__dj__stats__"
"""Data-Juicer's column of values."""

_ROWS_IN_A_GROUP = 10_000
_NEVER = 10**9
_HEADER = """\
# The recipe as Data-Juicer 1.6.1 runs it. From this folder:
#     HF_HUB_OFFLINE=1 dj-process --config recipe.yaml
# Captions are read from the column `caption`, which has no special tokens.
"""

ResolvedLimits = Mapping[str, Mapping[str, Any]]
"""Value key -> ``{"min": number, "max": number}``; a side that is missing or None is open."""


def recipe_yaml(
    operators: Sequence[Operator],
    limits: ResolvedLimits | None = None,
    *,
    executor: str = "default",
    processes: int = 1,
    settings: Mapping[str, Any] | None = None,
) -> str:
    """Data-Juicer's configuration of operators.

    Args:
        operators: In the order in which they apply.
        limits: The limits as numbers; None: all open, which measures and keeps every row.
        executor: ``default`` or ``ray``.
        processes: Processes of the default executor.
        settings: Top-level keys that are added or replaced.
    """
    content = {
        **base_settings(executor, processes),
        "process": [_entry(operator, limits or {}) for operator in operators],
        **(settings or {}),
    }
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000)


def base_settings(executor: str, processes: int) -> dict[str, Any]:
    """What every run of Data-Juicer has in common; most of it turns off a default that loses rows."""
    return {
        "project_name": "mgm_exp",
        "executor_type": executor,
        **({"ray_address": "local"} if executor == "ray" else {}),
        "np": processes,
        # Else every operator takes as many processes as the machine has cores, whatever np says.
        "auto_op_parallelism": executor == "ray",
        "text_keys": "text",
        "image_key": "images",
        "skip_op_error": False,  # else one bad image drops its whole batch, silently
        "open_monitor": False,  # else matplotlib is imported, or installed, at run time
        "open_tracer": False,
        "use_cache": False,
        "use_checkpoint": False,
        "keep_stats_in_res_ds": True,
        "job_id": "job",  # else every run has another working folder
    }


def write_recipe(
    folder: Path, rows: Path, image_root: Path, operators: Sequence[Operator], limits: ResolvedLimits
) -> Path:
    """Writes ``recipe.yaml`` and ``recipe_pairs.parquet``, which ``dj-process`` runs as they are.

    Args:
        folder: Existing folder.
        rows: JSON lines of ``id``, ``caption``, ``image``.
        image_root: Folder that the image paths are relative to; the written paths are absolute. Images in tar shards
            are unpacked into ``recipe_images/`` if an operator reads images, and left out if none does. In that case
            rows without an image come last: Data-Juicer cannot store an image's values after 1,000 rows without.
        operators: In the order in which they apply.
        limits: Value key -> ``min``, ``max`` as numbers.

    Returns:
        The path of ``recipe.yaml``.
    """
    settings = {
        # dataset_path would be split at blanks and searched for weights.
        "dataset": {"configs": [{"type": "local", "path": RECIPE_PAIRS}]},
        "export_path": f"{RECIPE_OUT}/kept.jsonl",
        "ds_cache_dir": f"{RECIPE_OUT}/cache",
    }
    text = recipe_yaml(operators, limits, settings=settings)
    with disk_full_named(folder):
        reads_images = any("image" in operator.kind.reads for operator in operators)
        _write_pairs(folder, rows, image_root, folder / RECIPE_IMAGES if reads_images else None)
        write_atomic(folder / RECIPE, _HEADER + text)
    return folder / RECIPE


def columns_of(pairs: Sequence[Pair], images: Sequence[str | None]) -> dict[str, list[Any]]:
    """The columns that Data-Juicer reads, for pairs with the absolute paths of their images.

    The column of values is there from the start: an empty one that Data-Juicer adds becomes JSON text inside
    ``datasets``, which keeps ten digits of a number.
    """
    return {
        "text": [
            f"{DJ_IMAGE}\n{pair.caption} {DJ_END}" if image else pair.caption
            for pair, image in zip(pairs, images, strict=True)
        ],
        "caption": [pair.caption for pair in pairs],
        "images": [[] if image is None else [image] for image in images],
        STATS: [{"row": row} for row in range(len(pairs))],
    }


def _entry(operator: Operator, limits: ResolvedLimits) -> dict[str, Any]:
    """One operator of ``process``."""
    kind = operator.kind
    parameters: dict[str, Any] = dict(kind.fixed)
    parameters.update({theirs: _given(operator.parameters[ours]) for ours, theirs in kind.parameters.items()})
    for key, names in kind.values.items():
        for name, number in _limits(names, limits.get(key, {}), kind.is_whole):
            parameters[name] = number
    if kind.reads == {"caption"}:
        parameters["text_key"] = "caption"
    return {kind.filter: parameters}


def _given(value: Any) -> Any:
    return os.path.abspath(value) if isinstance(value, (str, Path)) else value


def _limits(names: Limits, given: Mapping[str, Any], is_whole: bool) -> list[tuple[str, float]]:
    low, high = given.get("min"), given.get("max")
    found = []
    if names.min is not None:
        found.append((names.min, names.open_min if low is None else _number(low, is_whole, math.ceil, names.open_max)))
    if names.max is not None:
        found.append((names.max, names.open_max if high is None else _number(high, is_whole, math.floor, -_NEVER)))
    return found


def _number(given: float, is_whole: bool, whole: Callable[[float], int], never: float) -> float:
    """A limit; ``never``, which no value passes, for the percentile of no values (NaN)."""
    if math.isnan(given):
        return never
    # Data-Juicer takes whole numbers for whole values: 3.5 words at least are 4.
    return whole(given) if is_whole else float(given)


def arrow_columns() -> dict[str, Any]:
    """Arrow's types of the columns."""
    import pyarrow as pa

    text = pa.string()
    return {"text": text, "caption": text, "images": pa.list_(text), STATS: pa.struct([("row", pa.int64())])}


def _write_pairs(folder: Path, rows: Path, image_root: Path, unpack_to: Path | None) -> None:
    """Parquet, not JSON: reading JSON guesses types, and a column of texts that look like dates becomes dates."""
    import pyarrow as pa
    from pyarrow import parquet

    schema = pa.schema([("id", pa.string()), *arrow_columns().items()])
    partial = folder / f"{RECIPE_PAIRS}.partial"
    with parquet.ParquetWriter(partial, schema) as writer:
        pairs = read_pairs(rows)
        if unpack_to is not None:
            pairs = chain(
                (pair for pair in pairs if pair.image is not None),
                (pair for pair in read_pairs(rows) if pair.image is None),
            )
        for first in pairs:
            group = list(chain([first], islice(pairs, _ROWS_IN_A_GROUP - 1)))
            files = image_files(group, image_root, unpack_to)
            # What was unpacked moves with the folder, and Data-Juicer is started in it.
            images = [os.path.relpath(file, folder) if _is_below(file, unpack_to) else file for file in files]
            columns = {"id": [pair.id for pair in group], **columns_of(group, images)}
            writer.write_table(pa.table(columns, schema=schema))
    os.replace(partial, folder / RECIPE_PAIRS)


def _is_below(file: str | None, folder: Path | None) -> TypeGuard[str]:
    return file is not None and folder is not None and Path(file).is_relative_to(folder)
