"""Shards on disk: which are finished, and their lines in order."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mgm_exp.data.data_juicer.pairs import ShardPlan
from mgm_exp.data.records import json_line
from mgm_exp.store import write_atomic


def is_finished(folder: Path, plan: ShardPlan) -> bool:
    """Whether a shard's file is there with all its rows. Files appear whole, but a disk may lose their end."""
    try:
        content = (folder / plan.name).read_bytes()
    except FileNotFoundError:
        return False
    return content.count(b"\n") == plan.rows and content.endswith(b"\n")


def write_shard(folder: Path, plan: ShardPlan, lines: list[dict[str, Any]]) -> None:
    """Writes a shard's file, whole or not at all."""
    write_atomic(folder / plan.name, "".join(map(json_line, lines)))


def read_shard(folder: Path, plan: ShardPlan) -> Iterator[dict[str, Any]]:
    """The lines of a finished shard."""
    with open(folder / plan.name, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
