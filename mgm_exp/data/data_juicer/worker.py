"""The process that runs Data-Juicer: ``python -m mgm_exp.data.data_juicer.worker JOB PIPE PARENT``.

It takes a job (plain data), runs Data-Juicer's executor on one shard after the other, joins the values to the rows by
their numbers, writes each shard's file, and tells the parent through the pipe. One process does all shards: importing
Data-Juicer takes seconds.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import shutil
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence, Set
from itertools import islice
from pathlib import Path
from typing import Any

from mgm_exp.data.data_juicer import guards

if __name__ == "__mp_main__":  # a process that Data-Juicer spawned (on GPUs): it inherits nothing
    guards.apply()

from mgm_exp.data.data_juicer.emit import STATS, arrow_columns, columns_of
from mgm_exp.data.data_juicer.image_files import image_files
from mgm_exp.data.data_juicer.operators import Operator, value_keys
from mgm_exp.data.data_juicer.pairs import Pair, ShardPlan, read_pairs
from mgm_exp.data.data_juicer.shards import write_shard
from mgm_exp.data.formats import DJ_END, DJ_IMAGE
from mgm_exp.data.images import ImageFault, open_image
from mgm_exp.errors import DataError, MgmError, ModelError
from mgm_exp.store import die_with_parent

_INDEX = "row"
_MOST_NAMED = 5
_UNPACKED = Path("images").resolve()  # images of the shard at hand that lie in tar shards


def main(arguments: list[str]) -> int:
    """Does a job. Returns the exit code."""
    die_with_parent(parent_pid=int(arguments[2]))
    pipe = os.fdopen(int(arguments[1]), "w", encoding="utf-8", buffering=1)
    job = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))

    def tell(message: dict[str, Any]) -> None:
        pipe.write(json.dumps(message) + "\n")

    try:
        guards.apply()
        for shard in _work(job):
            tell(shard)
    except Exception as error:  # noqa: BLE001 - Data-Juicer raises anything; the parent decides what it means
        traceback.print_exc()
        advice = error.advice if isinstance(error, MgmError) else ""
        message = error.message if isinstance(error, MgmError) else str(error)
        tell({"error": type(error).__name__, "message": message, "advice": advice})
        return 1
    finally:
        pipe.close()
    return 0


def _work(job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    shards = Path("shards")
    plans = [ShardPlan(**plan) for plan in job["shards"]]
    if job["task"] == "caption":
        guards.let_blip2_take_prompts()
    run = DataJuicer(job["config"], job["executor"])
    root = Path(job["image_root"])
    for plan, pairs in _shards(Path(job["rows"]), plans):
        if job["task"] == "measure":
            operators = [Operator.from_json(operator) for operator in job["operators"]]
            lines = measured(run, pairs, root, operators, job["seed"])
        else:
            lines = captioned(run, plan, pairs, root, job["max_megapixels"])
        write_shard(shards, plan, lines)
        shutil.rmtree(_UNPACKED, ignore_errors=True)
        yield {"shard": plan.number, "rows": plan.rows}


def _shards(path: Path, plans: Sequence[ShardPlan]) -> Iterator[tuple[ShardPlan, list[Pair]]]:
    """The rows of each shard; the file is read once."""
    pairs, position = read_pairs(path), 0
    for plan in plans:
        rows = list(islice(pairs, plan.first - position, plan.first - position + plan.rows))
        position = plan.first + plan.rows
        if len(rows) != plan.rows:
            raise DataError(f"{path} was changed while it was read: it ends at row {plan.first + len(rows)}.")
        yield plan, rows


class DataJuicer:
    """Data-Juicer with one configuration, run on tables in memory.

    Args:
        config: YAML file.
        executor: ``default`` or ``ray``.
    """

    def __init__(self, config: str, executor: str) -> None:
        from data_juicer.config import init_configs

        self.is_ray = executor == "ray"
        if self.is_ray:
            _start_ray()
        # Its log and job folders are made below the folder of export_path: here.
        self.config = init_configs(["--config", config, "--export_path", "data_juicer/unused.jsonl"])
        if self.config.np == 1 and not self.is_ray:
            for entry in self.config.process:
                for parameters in entry.values():
                    parameters["num_proc"] = None  # in this process; for 1 a process is forked twice an operator

    def run(self, columns: dict[str, list[Any]], wanted: str, seed: int | None, operators: Set[str]) -> dict[int, Any]:
        """Processes rows.

        Args:
            columns: Name -> values; ``row`` numbers are added.
            wanted: Column to give back.
            seed: Of every generator; None: no operator runs a model.
            operators: Which of the configuration's operators are run.

        Returns:
            Row number -> value, of the rows that are left.
        """
        if seed is not None:
            from transformers import set_seed

            guards.without_gradients()
            set_seed(seed)
        table = {_INDEX: list(range(len(columns["text"]))), **columns}
        config = copy.deepcopy(self.config)
        config.process = [entry for entry in config.process if not operators.isdisjoint(entry)]
        rows = self._on_ray(config, table, wanted) if self.is_ray else self._here(config, table, wanted)
        return {row[_INDEX]: row[wanted] for row in rows}

    def _here(self, config: Any, table: dict[str, list[Any]], wanted: str) -> list[dict[str, Any]]:
        from data_juicer.core import DefaultExecutor
        from data_juicer.core.data import NestedDataset
        from datasets import Dataset

        # A table in memory: read from a file it would be copied into a cache in the user's home.
        rows = NestedDataset(Dataset(_arrow(table)))
        done = DefaultExecutor(config).run(dataset=rows, skip_export=True)
        return list(done.select_columns([_INDEX, wanted]).to_list())

    def _on_ray(self, config: Any, table: dict[str, list[Any]], wanted: str) -> list[dict[str, Any]]:
        from data_juicer.core.executor.ray_executor import RayExecutor
        from pyarrow import parquet

        path = Path("ray_rows.parquet").resolve()
        parquet.write_table(_arrow(table), path)
        config.dataset = {"configs": [{"type": "local", "path": str(path)}]}
        try:
            done = RayExecutor(config).run(skip_export=True)
            return list(done.data.select_columns([_INDEX, wanted]).take_all())
        finally:
            path.unlink()


def _arrow(table: Mapping[str, list[Any]]) -> Any:
    """An Arrow table with given types: guessed ones depend on the rows."""
    import pyarrow as pa

    kinds = {_INDEX: pa.int64(), **arrow_columns()}
    return pa.table(dict(table), schema=pa.schema([(name, kinds[name]) for name in table]))


def _start_ray() -> None:
    """Joins the cluster of RAY_ADDRESS or starts one here, before Data-Juicer would: its workers need the guards."""
    import ray

    address = os.environ.get("RAY_ADDRESS")
    variables = {**guards.OFFLINE, "RAY_JOB": "1", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    ray.init(
        address=address or "local",
        runtime_env={"worker_process_setup_hook": f"{guards.__name__}.apply", "env_vars": variables},
        **({} if address else {"include_dashboard": False}),
    )


def measured(
    run: DataJuicer, pairs: Sequence[Pair], root: Path, operators: Sequence[Operator], seed: int
) -> list[dict[str, Any]]:
    """The lines of a shard: id and values of each row."""
    # Rows with and without an image go separately: where the first rows of a table have no image, Data-Juicer's empty
    # values have no type, and the first number after them cannot be stored.
    with_image = [number for number, pair in enumerate(pairs) if pair.image is not None]
    without = [number for number, pair in enumerate(pairs) if pair.image is None]
    values: dict[int, dict[str, Any]] = {}
    for numbers in filter(None, (with_image, without)):
        able = [operator for operator in operators if numbers is with_image or "image" not in operator.kind.reads]
        found = _values_of([pairs[number] for number in numbers], run, root, able, seed)
        values.update(zip(numbers, found, strict=True))
    keys = value_keys(operators)
    return [{"id": pair.id, **{key: values[number].get(key) for key in keys}} for number, pair in enumerate(pairs)]


def _values_of(
    pairs: Sequence[Pair], run: DataJuicer, root: Path, operators: Sequence[Operator], seed: int
) -> list[dict[str, Any]]:
    """The values of rows that all have an image or all have none."""
    if not operators:
        return [{} for _ in pairs]
    try:
        images = image_files(pairs, root, _UNPACKED)
    except ImageFault as fault:
        raise DataError(f"An image cannot be read any more, though it was checked: {fault.detail}.") from fault
    columns = columns_of(pairs, images)
    if not any(images):
        columns.pop("images")  # a column of empty lists has no type on Ray
    has_model = any(operator.kind.needs_model for operator in operators)
    try:
        rows = run.run(columns, STATS, seed if has_model else None, {operator.kind.filter for operator in operators})
    except Exception as error:
        _name_broken_images(pairs, images, error)
        raise
    lost = [pair.id for number, pair in enumerate(pairs) if number not in rows]
    if lost:
        raise ModelError(
            f"Data-Juicer gave no usable value (NaN) for {len(lost)} rows, e.g. {', '.join(lost[:_MOST_NAMED])}.",
            advice="A model in half precision or a damaged model folder does that.",
        )
    return [_values(rows[number], operators) for number in range(len(pairs))]


def _values(stats: Mapping[str, Any], operators: Sequence[Operator]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for operator in operators:
        for key, names in operator.kind.values.items():
            value = stats[names.stat]
            if not isinstance(value, (int, float)):
                (value,) = value  # one value for each image of the row
            values[key] = int(value) if operator.kind.is_whole else float(value)
            if not math.isfinite(values[key]):
                raise ModelError(f"Data-Juicer's {operator.kind.filter} gave {value} for a row.")
    return values


def captioned(
    run: DataJuicer, plan: ShardPlan, pairs: Sequence[Pair], root: Path, max_megapixels: float
) -> list[dict[str, Any]]:
    """The lines of a shard: id and caption of each row, or what is wrong with its image."""
    faults: dict[int, ImageFault] = {}
    for number, pair in enumerate(pairs):
        try:
            open_image(root, pair.image or "", max_megapixels)
        except ImageFault as fault:
            faults[number] = fault
    good = [pair for number, pair in enumerate(pairs) if number not in faults]
    texts: list[str] = []
    if good:
        columns = columns_of(good, image_files(good, root, _UNPACKED))
        rows = run.run(columns, "text", _seed(plan), {"image_captioning_mapper"})
        lost = [pair.id for number, pair in enumerate(good) if number not in rows]
        if lost or len(rows) != len(good):
            raise MgmError(f"Data-Juicer's mapper lost {len(lost)} rows, e.g. {', '.join(lost[:_MOST_NAMED])}.")
        texts = [_caption(rows[number]) for number in range(len(good))]
    captions = iter(texts)
    return [
        {"id": pair.id, "kind": faults[number].kind, "detail": faults[number].detail}
        if number in faults
        else {"id": pair.id, "caption": next(captions)}
        for number, pair in enumerate(pairs)
    ]


def _seed(plan: ShardPlan) -> int:
    """A shard's own seed: the digest holds the run's seed, the rows and the settings."""
    return int.from_bytes(hashlib.sha256(f"{plan.number} {plan.digest}".encode()).digest()[:4], "big")


def _caption(text: str) -> str:
    """What the mapper wrote between its special tokens."""
    return text.removeprefix(DJ_IMAGE).removesuffix(DJ_END).strip()


def _name_broken_images(pairs: Sequence[Pair], images: Sequence[str | None], cause: Exception) -> None:
    """Raises DataError if an image of the shard is what Data-Juicer failed on."""
    from data_juicer.utils.mm_utils import load_image

    broken = []
    for pair, image in zip(pairs, images, strict=True):
        if image is None:
            continue
        try:
            load_image(image)
        except Exception as error:  # noqa: BLE001 - decoders raise anything
            broken.append(f"{pair.image} (row {pair.id}): {error.__class__.__name__}: {error}"[:300])
    if broken:
        raise DataError(
            f"{len(broken)} images cannot be read any more, though they were checked: "
            f"{'; '.join(broken[:_MOST_NAMED])}.",
            advice="Were they changed since? Repair them and give the same command again; finished rows are kept.",
        ) from cause


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
