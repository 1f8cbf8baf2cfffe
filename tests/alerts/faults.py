"""Faults put into real runs of the demo: which alert each raises, after how long, and what the doctor names.

python -m tests.alerts.faults [ALERT ...]     # rewrites these rows of docs/alerts.md, or all; some minutes
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mgm_exp.doctor import case_of_run, diagnose

from .webhook import Webhook, webhook

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "alerts.md"
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"
# A run that lasts long enough to be disturbed: some seconds of training, nothing learnt.
RUN = (
    *("debug=fast", "data.demo_images=48", "train.max_steps=60", "train.align.max_steps=0", "train.workers=0"),
    *(
        "train.checkpoint.every_steps=100",
        "eval.max_questions=2",
        "eval.demo.baselines=false",
        "alerts.on_finish=false",
    ),
)
PATIENCE_S = 240.0
# A key of the address, in the environment of the run: nothing that the run writes may hold it.
VARIABLE, KEY = "ALERT_PATH", "canary0123456789"
Inject = Callable[["Run"], None]


@dataclass
class Run:
    """A run of the demo in a process of its own.

    Args:
        folder: ``paths.root``.
        process: Leads a group of its own.
        hook: Takes its messages.
    """

    folder: Path
    process: subprocess.Popen[bytes]
    hook: Webhook

    @property
    def run_dir(self) -> Path:
        return next(self.folder.glob("runs/*/*"))

    def wait_for(self, text: str) -> None:
        """Until a row with this text was written."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and self.process.poll() is None:
            for path in self.folder.glob("runs/*/*/metrics.jsonl"):
                if text in path.read_text(encoding="utf-8"):
                    return
            time.sleep(0.05)
        raise AssertionError(f"{text} was not reached: {self.output()}")

    def output(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in self.folder.glob("*.txt"))[-2000:]


@dataclass(frozen=True)
class Fault:
    """A fault and what must come of it.

    Args:
        title: For the table.
        overrides: Of the run.
        inject: What is done to the run once a row has ``shows``; None: the overrides are the fault.
        shows: What the row holds that the time counts from; None: none shows it.
        alert: The kind that must arrive.
        doctor: Id of the doctor's first cause afterwards.
        disk_mib: Size of the disk that the run has; None: that of the machine. Needs root.
    """

    title: str
    overrides: Sequence[str]
    inject: Inject | None
    shows: str | None
    alert: str
    doctor: str
    disk_mib: int | None = None


@dataclass(frozen=True)
class Seen:
    """What came of a fault.

    Args:
        alerts: Kind -> seconds after the fault; None: not known.
        doctor: Id of the first cause; empty: none.
    """

    alerts: dict[str, float | None]
    doctor: str


def step(number: int) -> str:
    """What a row of this step holds."""
    return f'"step": {number},'


def _kill(run: Run) -> None:
    os.killpg(run.process.pid, signal.SIGKILL)


def _stop(run: Run) -> None:
    """Hangs until its alert has come, and once more ten steps later."""
    os.kill(run.process.pid, signal.SIGSTOP)
    run.hook.wait(1, 60)
    os.kill(run.process.pid, signal.SIGCONT)
    run.wait_for(step(40))
    os.kill(run.process.pid, signal.SIGSTOP)
    time.sleep(20)
    os.kill(run.process.pid, signal.SIGCONT)


def _slow(run: Run) -> None:
    """Gets a fifth of the time only, until its end, in pieces shorter than a step: every step takes longer."""

    def pulse() -> None:
        while run.process.poll() is None:
            run.process.send_signal(signal.SIGSTOP)
            time.sleep(0.12)
            run.process.send_signal(signal.SIGCONT)
            time.sleep(0.03)

    threading.Thread(target=pulse, daemon=True).start()


FAULTS = (
    Fault(
        "a learning rate of 1e9 (NaN)",
        ("train.lr=1e9", "train.guards.on_nonfinite=stop"),
        None,
        '"event": "not_finite"',
        "TrainLossNaN",
        "nan-rate-too-high",
    ),
    Fault(
        "a learning rate of 1 (spikes, then NaN)",
        ("train.lr=1", "train.warmup_ratio=0.4"),
        None,
        None,
        "TrainSpike",
        "nan-rate-too-high",
    ),
    Fault(
        "the process hangs (SIGSTOP)",
        ("monitor.limits.stalled_s=5", "monitor.limits.stalled_steps=4"),
        _stop,
        step(30),
        "StalledStep",
        "process-stood-still",
    ),
    Fault("`kill -9`", (), _kill, step(5), "TrainerDown", "killed-without-a-word"),
    Fault(
        "a disk of 16 MiB that checkpoints fill",
        (
            *("train.checkpoint.every_steps=1", "train.checkpoint.keep=100", "train.checkpoint.background=false"),
            *("monitor.limits.disk_free_gib=0.005", "monitor.every_s=1"),
        ),
        None,
        None,
        "DiskFilling",
        "checkpoint-no-room",
        disk_mib=16,
    ),
    Fault(
        "a fifth of the processor time (SIGSTOP, SIGCONT)",
        ("monitor.limits.recent_s=4", "monitor.limits.history_s=60"),
        _slow,
        step(24),
        "ThroughputDrop",
        "throughput-falls",
    ),
)


@contextmanager
def running(folder: Path, overrides: Sequence[str], hook: Webhook) -> Iterator[Run]:
    """A run of the demo whose messages go to the webhook; ended on leaving."""
    addressed = f"alerts.urls=[{hook.url}/${VARIABLE}]"
    command = [sys.executable, "-m", "mgm_exp", *RUN, *overrides, addressed, f"paths.root={folder}"]
    environ = {**os.environ, VARIABLE: KEY}
    with (folder / "output.txt").open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, env=environ, start_new_session=True)
    try:
        yield Run(folder, process, hook)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGCONT)
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def disk(folder: Path, size_mib: int | None) -> Iterator[None]:
    """A small disk at a folder."""
    if size_mib is None:
        yield
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "none", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def holding(folder: Path, key: str) -> list[str]:
    """Files below a folder that hold a text."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [str(path.relative_to(folder)) for path in files if key.encode() in path.read_bytes()]


def meet(fault: Fault, folder: Path) -> Seen:
    """Runs the demo with a fault."""
    with disk(folder, fault.disk_mib), webhook() as hook, running(folder, fault.overrides, hook) as run:
        began = None
        if fault.shows is not None:
            run.wait_for(fault.shows)
            began = time.time()
        if fault.inject is not None:
            fault.inject(run)
        run.process.wait(PATIENCE_S)
        hook.wait(1, 30)
        alerts: dict[str, float | None] = {}
        for message in list(hook.heard):
            kind = message["title"].removeprefix("mgm_exp ").partition(":")[0]
            alerts.setdefault(kind, None if began is None else message["at"] - began)
        assert all(message["path"].endswith(KEY) for message in hook.heard)
        assert not (leaks := holding(folder, KEY)), f"the key stands in {leaks}"
        found = diagnose(case_of_run(run.run_dir)).findings
        return Seen(alerts, found[0].entry.id if found else "")


HEAD = ["| fault | messages, seconds after it | first cause of `mgm-exp doctor RUN` |", "| --- | --- | --- |"]


def row_of(fault: Fault, found: Seen) -> str:
    """For the table of the page."""
    told = ", ".join(
        f"`{kind}`" if seconds is None else f"`{kind}` {seconds:.1f}" for kind, seconds in found.alerts.items()
    )
    return f"| {fault.title} | {told or 'none'} | {f'`{found.doctor}`' if found.doctor else 'none'} |"


def main() -> None:
    """Meets every fault, or those whose alert is named, and rewrites their rows."""
    for fault in FAULTS:
        if sys.argv[1:] and fault.alert not in sys.argv[1:]:
            continue
        with tempfile.TemporaryDirectory() as folder:
            row = row_of(fault, meet(fault, Path(folder)))
        print(row, flush=True)
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        known, _, after = rest.partition(END)
        rows = {line.split(" | ")[0]: line for line in [*known.splitlines()[3:], row] if line}
        ordered = [rows[f"| {one.title}"] for one in FAULTS if f"| {one.title}" in rows]
        PAGE.write_text("\n".join([before + BEGIN, *HEAD, *ordered, END]) + after, encoding="utf-8")


if __name__ == "__main__":
    main()
