"""The table of docs/reliability.md: one row for each kind of fault, filled by the tests that inject it.

A test that has met its faults and found nothing lost says so with :func:`met`. ``make test-full`` keeps the notes in a
folder (the environment's ``FAULT_NOTES``) and writes the table from them:

    python -m tests.fault_table NOTES docs/reliability.md
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

BEGIN, END = "<!-- faults: written by make test-full -->", "<!-- end of faults -->"


@dataclass(frozen=True)
class Fault:
    """A row: what happens, how the tests make it happen, what may be lost at most (asserted), what peers do."""

    what: str
    injected: str
    lost: str
    peers: str


_SAVE_PEERS = (
    "HF Trainer takes the highest folder, whole or not (transformers#35782); DeepSpeed can leave an empty `latest`"
)
_CELL_PEERS = "plain Optuna begins a killed trial again from its first step, or leaves it running for ever"
FAULTS: dict[str, Fault] = {
    "kill: store": Fault(
        "killed while a checkpoint is saved or a stage is published",
        "SIGKILL at each disk-changing system call (strace)",
        "nothing committed",
        _SAVE_PEERS,
    ),
    "kill: training": Fault(
        "killed in a training stage of two steps",
        "SIGKILL at each disk-changing system call (strace)",
        "steps since the last checkpoint; the end is bit-equal",
        _SAVE_PEERS,
    ),
    "kill: sweep": Fault(
        "killed in a sweep's bookkeeping",
        "SIGKILL at each change of the disk; three sweepers side by side, killed at random",
        "no finished trial, no number twice, no zombie",
        _CELL_PEERS,
    ),
    "kill: recaption": Fault(
        "killed while captions are written",
        "SIGKILL at each disk-changing system call (strace)",
        "one batch of captions; the files are byte-equal",
        "Data-Juicer starts over from its last checkpointed operator, if that was asked for",
    ),
    "error: ENOSPC": Fault(
        "a write fails: no space",
        "ENOSPC at each write of a save and a publication (strace)",
        "nothing committed; one clear error",
        "`torch.save` raises a RuntimeError without errno and leaves a partial file",
    ),
    "error: EIO": Fault(
        "fsync fails",
        "EIO at each fsync of a save and a publication (strace)",
        "nothing committed; one clear error",
        "most do not call fsync",
    ),
    "damage": Fault(
        "a checkpoint's file is truncated, changed, swapped, missing",
        "ten damages to each file; a flipped bit anywhere",
        "the damaged checkpoint; named, the one before is taken",
        "a flipped bit loads silently from .pt and .safetensors",
    ),
    "soak: kill": Fault("killed at any moment", "SIGKILL", "steps since the last checkpoint", _SAVE_PEERS),
    "soak: term": Fault("asked to stop", "SIGTERM", "nothing", "submitit swallows SIGTERM"),
    "soak: stop": Fault("stopped and continued", "SIGSTOP, SIGCONT", "nothing", "the same"),
    "soak: full": Fault(
        "the disk is full",
        "a small tmpfs filled but for half a checkpoint",
        "steps since the last checkpoint",
        "the last checkpoint folder stays incomplete and is taken next time",
    ),
    "soak: slow": Fault("a slow disk", "10 ms more for each fsync", "nothing", "the same"),
    "soak: clock": Fault("the clock jumps", "by an hour or a day, both ways, at each look", "nothing", "not tested"),
    "soak: rot": Fault(
        "a bit of the newest checkpoint flips after a kill",
        "one bit of one file",
        "that checkpoint; named",
        "loaded silently",
    ),
    "soak: cut": Fault(
        "a file of the newest checkpoint is cut off after a kill",
        "truncated anywhere",
        "that checkpoint; named",
        "an exception; no fall-back",
    ),
    "soak: torn": Fault("half a line in metrics.jsonl", "a torn last line", "nothing", "a reader that fails"),
}


def met(fault: str, times: int) -> None:
    """A test has injected ``fault`` so many times, and what it asserts held."""
    assert fault in FAULTS, fault
    if folder := os.environ.get("FAULT_NOTES"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        with open(Path(folder) / f"{os.getpid()}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps([fault, times]) + "\n")


def table(notes: Path) -> str:
    """The Markdown table of what was noted.

    Raises:
        SystemExit: a fault that no test has met: a table with a gap would say less than it seems to.
    """
    times: Counter[str] = Counter()
    for path in sorted(notes.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            fault, number = json.loads(line)
            times[fault] += number
    if missing := [fault for fault in FAULTS if not times[fault]]:
        raise SystemExit(f"no test has met: {', '.join(missing)}")
    rows = [
        "| fault | injected | times | lost at most | wrong results | elsewhere |",
        "| --- | --- | ---: | --- | ---: | --- |",
    ]
    rows += [f"| {f.what} | {f.injected} | {times[key]:,} | {f.lost} | 0 | {f.peers} |" for key, f in FAULTS.items()]
    return "\n".join(rows)


def write_table(notes: Path, page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    region = re.compile(re.escape(BEGIN) + ".*" + re.escape(END), re.DOTALL)
    if not region.search(text):
        raise SystemExit(f"{page} has no place for the table: {BEGIN} ... {END}")
    page.write_text(region.sub(lambda _: f"{BEGIN}\n{table(notes)}\n{END}", text), encoding="utf-8")


if __name__ == "__main__":
    write_table(Path(sys.argv[1]), Path(sys.argv[2]))
