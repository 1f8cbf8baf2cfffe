"""A store of 100,000 entries: look-up, publication, listing and collection, beside a store of 100.

The entries are written as the store writes them (a file, its record, its mark), without the fsyncs. What is measured is
the store's own code on them: nothing that is done for one entry may depend on how many there are.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measurement import Row, timed

ENTRIES, ENTRIES_QUICK = 100_000, 300
FEW = 100
LOOKS, LOOKS_QUICK = 400, 20
PUBLISHED = 12
OLD_S = 30 * 86_400.0


def run(work: Path, quick: bool = False) -> list[Row]:
    """Measures a store of few entries and one of many."""
    many = int(os.environ.get("SCALE_ENTRIES", ENTRIES_QUICK if quick else ENTRIES))
    found = {size: measure(work / str(size), size, quick) for size in (FEW, many)}
    few, lot = found[FEW], found[many]
    for size, one in found.items():
        print(size, {name: round(value, 2) for name, value in one.items()}, flush=True)
    return [
        *(
            Row(
                f"store of {many:,} entries and of {FEW}: {what}",
                "ms",
                lot[name],
                few[name],
                0.7,
                "the same call on the same kind of entry",
                "medians; wall time, page cache warm",
            )
            for name, what in (("look_up", "look-up"), ("publish", "publication"), ("again", "publication, second try"))
        ),
        *(
            Row(
                f"store of {many:,} entries: {what}, an entry",
                "ms",
                1000 * lot[name] / count,
                1000 * few[name] / few_count,
                None,
                f"{lot[name]:.1f} s in all",
                "wall time, page cache warm; peer: the small store",
            )
            for name, what, count, few_count in (
                ("list", "listing all", many, FEW),
                ("keep", "collection that keeps all", many, FEW),
                ("drop", "collection that drops a tenth", many // 10, FEW // 10),
            )
        ),
    ]


def measure(root: Path, size: int, quick: bool) -> dict[str, float]:
    """Milliseconds of a look-up and a publication, seconds of the rest."""
    from mgm_exp.store import Store, remove_folder, write_atomic

    keys = fill(root, size)
    store = Store(root)
    looks = LOOKS_QUICK if quick else LOOKS
    found: dict[str, float] = {}
    chosen = [keys[number * (len(keys) - 1) // looks] for number in range(looks)]
    for key in chosen:
        store.entry("stage", key)
    found["look_up"] = 1000 * median(_times(lambda key: store.entry("stage", key), chosen))

    def publish(key: str) -> None:
        store.produce("stage", key, lambda work: write_atomic(work / "out" / "value", key), inputs={"key": key})

    def fail(work: Path) -> None:
        raise KeyError("not yet")

    def try_again(key: str) -> None:
        before = time.perf_counter()
        publish(key)
        again.append(time.perf_counter() - before)

    fresh = [f"fresh{number}" for number in range(PUBLISHED)]
    found["publish"] = 1000 * median(_times(publish, fresh))
    again: list[float] = []
    for number in range(PUBLISHED):
        key = f"again{number}"
        try:
            store.produce("stage", key, fail, inputs={})
        except KeyError:
            try_again(key)
    found["again"] = 1000 * median(again)
    found["list"], listed = timed(lambda: sum(1 for _ in store.entries()))
    assert listed == size + 2 * PUBLISHED
    found["keep"], dropped = timed(lambda: store.gc(older_than_s=OLD_S * 10))
    assert dropped == []
    for key in keys[: size // 10]:
        os.utime(root / "stage" / key, (time.time() - OLD_S, time.time() - OLD_S))
    found["drop"], dropped = timed(lambda: store.gc(older_than_s=OLD_S / 2))
    assert len(dropped) == size // 10, len(dropped)
    remove_folder(root)
    return found


def _times(call: Callable[[str], Any], keys: list[str]) -> list[float]:
    return [timed_once(call, key) for key in keys]


def timed_once(call: Callable[[str], Any], key: str) -> float:
    """Seconds of one call."""
    before = time.perf_counter()
    call(key)
    return time.perf_counter() - before


def fill(root: Path, size: int) -> list[str]:
    """Entries as the store publishes them; gives their keys."""
    import hashlib

    from mgm_exp.store import encode_json, stage_key
    from mgm_exp.store.sealed import MARK, _encode

    keys = [stage_key("stage", 1, {"seed": number}) for number in range(size)]
    for number, key in enumerate(keys):
        folder = root / "stage" / key
        folder.mkdir(parents=True)
        record = {
            "schema_version": 1,
            "stage": "stage",
            "key": key,
            "inputs": {"seed": number, "packages": {"torch": "2.13.0"}},
            "meta": {"steps": 100},
            "seconds": 1.5,
            "attempts": 1,
            "created_at": "2026-01-01T00:00:00+00:00",
        }
        facts = {}
        for name, raw in (("value", key.encode() * 50), ("stage.json", encode_json(record))):
            (folder / name).write_bytes(raw)
            written = (folder / name).stat()
            facts[name] = {
                "sha256": hashlib.sha256(raw).hexdigest(),
                "size": written.st_size,
                "mtime_ns": written.st_mtime_ns,
            }
        (folder / MARK).write_bytes(_encode(facts))
    return keys


if __name__ == "__main__":  # DIR [--quick]
    for row in run(Path(sys.argv[1]), quick="--quick" in sys.argv):
        print(f"{row.name}: {row.ours:.2f} {row.unit}, {row.peer:.2f}; {row.exactness}")
