"""Not a test: checkpoint 4 over 1..3, keeping two; then a stage of the store. Says what it promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mgm_exp.store import Store, prune, publish_folder, write_atomic
from tests.system_calls import say


def commit(root: Path) -> None:
    checkpoints = root / "checkpoints"
    unfinished = checkpoints / "step-4.tmp"
    unfinished.mkdir()
    write_atomic(unfinished / "weights", b"4" * 5000)
    with open(unfinished / "log", "w") as file:
        for _ in range(3):
            file.write("x" * 3000)
            file.flush()
    publish_folder(unfinished, checkpoints / "step-4")
    say("committed")
    prune(checkpoints, 2)

    def make(work: Path) -> dict[str, Any]:
        (work / "out" / "result").write_text("right")
        return {}

    Store(root / "store").produce("align", "key", make, inputs={})
    say("published")
