"""Recaptioning with Data-Juicer's ``image_captioning_mapper``: seeded, by shards, with the rows' ids.

The mapper always samples, takes no seed, gives no ids back and starts again from nothing when it is killed. Here each
shard has a seed of its own and is one file, so that the result does not depend on interruptions.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import yaml

from mgm_exp.data.data_juicer.child import messages
from mgm_exp.data.data_juicer.emit import base_settings
from mgm_exp.data.data_juicer.installed import require_data_juicer
from mgm_exp.data.data_juicer.models import check_mapper_model
from mgm_exp.data.data_juicer.pairs import Pair, plan_shards
from mgm_exp.data.data_juicer.shards import is_finished, read_shard
from mgm_exp.data.records import json_line
from mgm_exp.errors import MgmError
from mgm_exp.store import disk_full_named, write_atomic

CAPTION_YAML = "caption.yaml"
_WANTED = "wanted.jsonl"


class Wanted(Protocol):
    """A row whose image wants a caption."""

    @property
    def id(self) -> str: ...

    @property
    def image(self) -> str | None: ...


def caption_with_mapper(
    rows: Iterable[Wanted],
    image_root: Path,
    folder: Path,
    *,
    work: Path,
    batch_size: int = 16,
    seed: int = 0,
    shard_rows: int = 1000,
    prompt: str | None = None,
    max_megapixels: float = 50.0,
) -> Iterator[dict[str, Any]]:
    """One result for each row, in order, as soon as its shard is finished.

    Args:
        rows: With an ``id`` and an ``image``.
        image_root: Folder that the image paths are relative to.
        folder: A local BLIP-2 folder of the OPT kind.
        work: Folder that survives an interruption; it belongs to these rows and this captioner alone.
        batch_size: Images in one forward pass.
        seed: Of the sampling; with the rows it determines every caption.
        shard_rows: Rows of a shard: what a kill costs, and how often the model is loaded.
        prompt: Begins every caption; None: none.
        max_megapixels: Images with more pixels are refused.

    Yields:
        ``{"id", "caption"}``, or ``{"id", "kind", "detail"}`` of an image that cannot be opened.

    Raises:
        MissingDependencyError: Data-Juicer is not installed.
        ModelError: the folder is no BLIP-2 that the mapper can run.
        MgmError: Data-Juicer failed.
    """
    engine = require_data_juicer()
    check_mapper_model(folder, prompt)
    shards = work / "shards"
    shards.mkdir(parents=True, exist_ok=True)
    with disk_full_named(work):
        wanted = work / _WANTED
        write_atomic(wanted, "".join(json_line(Pair(row.id, "", row.image).to_json()) for row in rows))
        circumstances = {"engine": engine, "batch_size": batch_size, "seed": seed, "prompt": prompt}
        plans = plan_shards(wanted, shard_rows, circumstances)
        missing = [plan for plan in plans if not is_finished(shards, plan)]
        write_atomic(work / CAPTION_YAML, mapper_yaml(folder, batch_size=batch_size, prompt=prompt))
        job = {
            "task": "caption",
            "config": CAPTION_YAML,
            "rows": os.path.abspath(wanted),
            "image_root": os.path.abspath(image_root),
            "max_megapixels": max_megapixels,
            "executor": "default",
            "shards": [vars(plan) for plan in missing],
        }
        finished = messages(job, work) if missing else iter(())
        for plan in plans:
            if plan in missing and next(finished)["shard"] != plan.number:
                raise MgmError(f"Data-Juicer's process did not finish shard {plan.number} when it should.")
            yield from read_shard(shards, plan)
        for message in chain(finished):
            raise MgmError(f"Data-Juicer's process said more than it was asked for: {message}.")


def mapper_yaml(folder: Path, *, batch_size: int, prompt: str | None) -> str:
    """Data-Juicer's configuration of the mapper."""
    mapper = {
        "hf_img2seq": os.path.abspath(folder),
        "keep_original_sample": False,
        "keep_candidate_mode": "random_any",
        "caption_num": 1,
        "prompt": prompt,
        "batch_size": batch_size,
        "gpu_batch_size": batch_size,
    }
    content = {**base_settings("default", 1), "process": [{"image_captioning_mapper": mapper}]}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000)
