"""Measuring: Data-Juicer computes the values of its operators for every row; nothing is dropped here.

Rows go through Data-Juicer shard by shard. A finished shard is one file, written whole or not at all, so that a kill
costs one shard, and what stands in ``values.jsonl`` in the end does not depend on interruptions, on the executor or on
the number of processes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from mgm_exp.data.data_juicer.child import messages
from mgm_exp.data.data_juicer.emit import recipe_yaml
from mgm_exp.data.data_juicer.installed import require_data_juicer
from mgm_exp.data.data_juicer.models import check_model_folder
from mgm_exp.data.data_juicer.operators import Operator, value_keys
from mgm_exp.data.data_juicer.pairs import ShardPlan, plan_shards
from mgm_exp.data.data_juicer.report import VALUES, MeasureReport, Progress
from mgm_exp.data.data_juicer.shards import is_finished
from mgm_exp.errors import ConfigError
from mgm_exp.store import disk_full_named, write_atomic

EXECUTORS = ("default", "ray")
SHARD_ROWS, SHARD_ROWS_WITH_MODEL = 20_000, 2_000
MEASURE_YAML = "measure.yaml"


def measure(
    rows: Path,
    image_root: Path,
    operators: Sequence[Operator],
    *,
    work: Path,
    out: Path,
    executor: str = "default",
    processes: int = 1,
    shard_rows: int | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> MeasureReport:
    """Writes ``values.jsonl`` into ``out``: ``id`` and the operators' values of each row, in the order of the rows.

    A row without an image has no value (null) where an operator needs one.

    Args:
        rows: JSON lines of ``id``, ``caption``, ``image`` (relative, or null). Their images have been checked.
        image_root: Folder that the image paths are relative to.
        operators: What to measure.
        work: Folder that survives an interruption; it belongs to these rows alone.
        out: Existing folder.
        executor: ``default``: on this machine; ``ray``: on the Ray cluster of ``RAY_ADDRESS``, else on all cores here.
        processes: Processes of the default executor.
        shard_rows: Rows of a shard; None: 20,000, and 2,000 where an operator runs a model.
        seed: Of every shard, for operators that draw; those there are do not.
        on_progress: Called with (what, rows done, rows in all).

    Raises:
        MissingDependencyError: Data-Juicer, or a package that it needs, is not installed.
        ModelError: a model folder cannot be used.
        DataError: a row is malformed, or an image cannot be read any more; it is named.
        MgmError: Data-Juicer failed.
    """
    engine = require_data_juicer()
    keys = value_keys(operators)
    if executor not in EXECUTORS:
        raise ConfigError(f"There is no executor {executor!r}; there are: {', '.join(EXECUTORS)}.")
    for operator in operators:
        if operator.kind.needs_model:
            check_model_folder(operator.name, Path(operator.parameters["path"]))
    if shard_rows is None:
        has_model = any(operator.kind.needs_model for operator in operators)
        shard_rows = SHARD_ROWS_WITH_MODEL if has_model else SHARD_ROWS
    circumstances = {"engine": engine, "seed": seed, "operators": [operator.to_json() for operator in operators]}
    plans = plan_shards(rows, shard_rows, circumstances)
    folder = work / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    missing = [plan for plan in plans if not is_finished(folder, plan)]
    total = sum(plan.rows for plan in plans)
    from_before = done = total - sum(plan.rows for plan in missing)
    with disk_full_named(work):
        if missing and operators:
            if on_progress is not None:
                on_progress("measure", done, total)
            write_atomic(work / MEASURE_YAML, recipe_yaml(operators, executor=executor, processes=processes))
            job = {
                "task": "measure",
                "config": MEASURE_YAML,
                "rows": os.path.abspath(rows),
                "image_root": os.path.abspath(image_root),
                "operators": [operator.to_json() for operator in operators],
                "executor": executor,
                "seed": seed,
                "shards": [vars(plan) for plan in missing],
            }
            for message in messages(job, work):
                done += message["rows"]
                if on_progress is not None:
                    on_progress("measure", done, total)
        _join(folder, plans, out / VALUES)
    return MeasureReport(engine, executor, total, from_before, keys)


def _join(folder: Path, plans: Sequence[ShardPlan], target: Path) -> None:
    partial = target.with_name(f"{target.name}.partial")
    with open(partial, "wb") as joined:
        for plan in plans:
            with open(folder / plan.name, "rb") as shard:
                shutil.copyfileobj(shard, joined)
        joined.flush()
        os.fsync(joined.fileno())
    os.replace(partial, target)
