"""Reads what the W&B client wrote offline: LevelDB's log format around protobuf records, with W&B's own header.

Source: LevelDB's log_format.md; the header is ``:W&B``, magic 0xBEE1, version 0. There is no public Python API for it.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32 * 1024
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


class OfflineRun:
    """One ``run-<id>.wandb`` file.

    Attributes:
        run: The run record (id, group, job type, tags, display name); a protobuf message.
        config: The config, values decoded.
        history: One dict for each ``log`` call.
        summary: The last value of each summary key.
        metrics: Defined metrics: name (or glob) -> step metric.
        exit_code: None while the run was not closed.
    """

    def __init__(self, path: Path) -> None:
        self.run: Any = None
        self.config: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.metrics: dict[str, str] = {}
        self.exit_code: int | None = None
        for record in _records(path):
            self._take(record)

    def _take(self, record: Any) -> None:
        kind = record.WhichOneof("record_type")
        if kind == "run":
            self.run = record.run
            self.config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            self.history.append({_key(item): json.loads(item.value_json) for item in record.history.item})
        elif kind == "summary":
            self.summary.update({_key(item): json.loads(item.value_json) for item in record.summary.update})
        elif kind == "metric":
            metric = record.metric
            self.metrics[metric.name or metric.glob_name] = metric.step_metric
        elif kind == "exit":
            self.exit_code = record.exit.exit_code


def _key(item: Any) -> str:
    return item.key or "/".join(item.nested_key)


def _records(path: Path) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    for payload in _payloads(path.read_bytes()):
        record = Record()
        record.ParseFromString(payload)
        yield record


def _payloads(data: bytes) -> Iterator[bytes]:
    assert struct.unpack("<4sHB", data[:7]) == (b":W&B", 0xBEE1, 0)
    at, parts = 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        checksum, length, kind = struct.unpack("<IHB", data[at : at + 7])
        payload = data[at + 7 : at + 7 + length]
        if kind == 0 or len(payload) < length:
            return  # the end was not written any more
        assert zlib.crc32(bytes([kind]) + payload) == checksum
        at += 7 + length
        parts = payload if kind in (FULL, FIRST) else parts + payload
        if kind in (FULL, LAST):
            yield parts
