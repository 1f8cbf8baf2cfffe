"""The table of docs/reliability.md: one row for each kind of fault, filled by the tests that inject it.

A test that has met its faults and found nothing lost says so with :func:`met`, as its last act: a test that fails notes
nothing. ``make test-full`` keeps the notes in a folder (the environment's ``FAULT_NOTES``) and writes the table:

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


_SAVE = "HF Trainer stops at an incomplete highest folder, the one before is not tried (transformers#35782)"
_DEEPSPEED = "DeepSpeed writes `latest` in place: 15 of 83 kill points of that pattern could not be continued"
_CELL = "Optuna's journal keeps a killed trial as running for ever"
_BOUNDED = "Pillow decodes 12,000 x 12,000 pixels with a warning; torch's DCP and DeepSpeed's converters run a pickle"
_SAME = "not looked at"
FAULTS: dict[str, Fault] = {
    "kill: python": Fault(
        "killed in a save, a write, a lease, a publication",
        "the end at each call of Python that changes the disk; half-way in a write, too",
        "nothing committed",
        _DEEPSPEED,
    ),
    "kill: store": Fault(
        "killed while a checkpoint is saved and a stage published",
        "SIGKILL at each disk-changing system call (strace)",
        "nothing committed",
        _DEEPSPEED,
    ),
    "kill: training": Fault(
        "killed in a training stage",
        "SIGKILL at each disk-changing system call of two steps (strace), and at named moments of a save",
        "steps since the last checkpoint; the end is bit-equal",
        _SAVE,
    ),
    "kill: sweep": Fault(
        "killed in a search's bookkeeping",
        "the end at changes by Python; SIGKILL at up to 20 system calls of each kind, SQLite and journal (strace)",
        "the step under way; no finished trial is repeated, no number used twice",
        _CELL,
    ),
    "kill: sweepers": Fault(
        "three sweepers on one study, one killed again and again",
        "SIGKILL at random moments",
        "one step for each kill; no trial lost, none left running",
        _CELL,
    ),
    "kill: recaption": Fault(
        "killed while captions are written",
        "SIGKILL at each disk-changing system call (strace)",
        "one batch of captions; the files are byte-equal",
        _SAME,
    ),
    "kill: process": Fault(
        "one of several processes is killed, or their parent",
        "SIGKILL in ZeRO-2 and ZeRO-3",
        "steps since the last checkpoint; the end is bit-equal",
        "torchelastic starts all again, and keeps no state",
    ),
    "hang": Fault(
        "a process of another machine stops answering",
        "SIGSTOP",
        "steps since the last checkpoint; named, and where the others wait; replaced, and the end is bit-equal",
        "NVIDIA's resiliency extension restarts inside of the process",
    ),
    "signal": Fault("asked to stop", "SIGTERM, SIGINT", "nothing", "submitit swallows SIGTERM"),
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
        _SAME,
    ),
    "full": Fault(
        "the disk fills up and stays full",
        "at each write and fsync of a save; a real small file system",
        "nothing committed; no half file stays",
        "`torch.save` leaves a partial file",
    ),
    "damage": Fault(
        "a checkpoint's file is truncated, changed, swapped, missing",
        "ten damages to each file; a flipped bit anywhere",
        "the damaged checkpoint; named, the one before is taken",
        "a flipped bit loads silently from .pt and .safetensors",
    ),
    "not finite": Fault(
        "NaN in a loss",
        "a sample whose pixels are NaN; in one, two, and sharded processes",
        "the step under way, named by its samples, on every process",
        "Composer's NaNMonitor looks for NaN only, infinity passes",
    ),
    "poisoned state": Fault(
        "infinity in a weight",
        "written between two steps",
        "steps since the last checkpoint, which is kept; the poisoned state is never saved",
        _SAME,
    ),
    "spike": Fault(
        "a loss that jumps",
        "a sample with 1,000 times the loss: warn, skip, lower the rate, roll back, stop; killed meanwhile, too",
        "what the policy says: one step, or the batches since the checkpoint; named",
        "llm-foundry's KillLossSpike only logs by default; PaLM went back and skipped 200-500 batches",
    ),
    "memory": Fault(
        "memory ends in a step",
        "torch's OutOfMemoryError above a number of samples; on one of several processes, too",
        "nothing: the micro-batch is halved, or the state before the step is saved",
        _SAME,
    ),
    "tracker": Fault(
        "W&B refuses, fails, hangs, loses files",
        "a server on this machine",
        "nothing: training goes on, `wandb-sync` sends the rest once",
        _SAME,
    ),
    "hostile": Fault(
        "files that want to harm",
        "bombs, pickles, lying headers, paths that lead out, links, pipes, deep and long rows",
        "the row, or the file; named; nothing ran",
        _BOUNDED,
    ),
    "fuzzed": Fault(
        "files that were changed anywhere",
        "26 readers of foreign files, each with whole files that hypothesis changes, and atheris where it is installed",
        "nothing: a value, or the reader's own error",
        _SAME,
    ),
    "hostile settings": Fault(
        "settings that would call, import or lead out",
        "presets and overrides with `_target_`, callbacks, search paths, resolvers",
        "nothing: refused before anything runs",
        "plain Hydra ran a callback's `_target_`",
    ),
    "other clock": Fault(
        "a machine with a wrong clock on the shared file system",
        "two days slow, 40 days fast",
        "nothing: nobody's work is taken over",
        _SAME,
    ),
    "soak: kill": Fault("killed at any moment of a long stage", "SIGKILL", "steps since the last checkpoint", _SAVE),
    "soak: term": Fault("asked to stop in a long stage", "SIGTERM", "nothing", "submitit swallows SIGTERM"),
    "soak: stop": Fault("stopped and continued", "SIGSTOP, SIGCONT", "nothing", _SAME),
    "soak: full": Fault(
        "the disk is full in a long stage",
        "a small tmpfs filled but for half a checkpoint",
        "steps since the last checkpoint",
        "`torch.save` leaves a partial file",
    ),
    "soak: slow": Fault("a slow disk", "10 ms more for each fsync", "nothing", _SAME),
    "soak: clock": Fault("the clock jumps", "by an hour or a day, both ways, at each look", "nothing", _SAME),
    "soak: rot": Fault(
        "a bit of the newest checkpoint flips after a kill",
        "one bit of one file",
        "that checkpoint; named",
        "a flipped bit loads silently from .pt and .safetensors",
    ),
    "soak: cut": Fault(
        "a file of the newest checkpoint is cut off after a kill",
        "truncated anywhere",
        "that checkpoint; named",
        _SAVE,
    ),
    "soak: torn": Fault("half a line in metrics.jsonl", "a torn last line", "nothing", _SAME),
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
        raise SystemExit(f"no test has met (strace and leave to mount are needed): {', '.join(missing)}")
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
