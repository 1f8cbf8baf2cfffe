"""What watching costs: the trainer's own step, with everything on, and without.

Watched: each row goes through the sink (spikes, Prometheus), a thread samples the machine, and another process asks
for all numbers over HTTP. CPU time of the process, one thread, losses compared bit for bit. Two ways to measure, since
the first is below what steps scatter by: each part alone (a row, a sample, an answer), added up for the default rates;
and the step as a whole, blocks with and without alternated, samples and questions 20 times as often as by default.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.feature_cache import make_photos, training
from benchmarks.measurement import Row

STEPS, REPEATS, ROWS = 8, 4, 2000
STEPS_QUICK, REPEATS_QUICK, ROWS_QUICK = 1, 1, 100
OFTENER = 20
SAMPLES_S, QUESTIONS_S = 10.0, 15.0
PORT = 19_400
# With watching a step may take 1 % more.
GOAL = 0.99
_ASKS = """
import sys, time, urllib.request
while True:
    urllib.request.urlopen(sys.argv[1]).read()
    time.sleep(float(sys.argv[2]))
"""


def run(work: Path, quick: bool = False) -> list[Row]:
    """The parts added up, and the whole."""
    import torch

    torch.set_num_threads(1)
    steps, repeats, rows = (STEPS_QUICK, REPEATS_QUICK, ROWS_QUICK) if quick else (STEPS, REPEATS, ROWS)
    make_photos(work, 8)
    sides: dict[str, Iterator[float]] = {name: training(work, [], lambda said: None) for name in ("ours", "peer")}
    losses: dict[str, list[float]] = {name: [next(side)] for name, side in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats):
        for name in sorted(sides, reverse=repeat % 2 == 1):
            watching = _Watching(work) if name == "ours" else None
            began = time.process_time()
            for step in range(steps):
                losses[name].append(next(sides[name]))
                if watching is not None:
                    watching.row(step, losses[name][-1])
            seconds[name].append((time.process_time() - began) / steps)
            if watching is not None:
                watching.close()
    mine, theirs = (statistics.median(seconds[name]) for name in ("ours", "peer"))
    ratios = [without / with_ for with_, without in zip(seconds["ours"], seconds["peer"], strict=True)]
    a_row, a_sample, a_question = _parts(work, rows)
    share = (a_row + theirs * (a_sample / SAMPLES_S + a_question / QUESTIONS_S)) / theirs
    is_equal = losses["ours"] == losses["peer"]
    exactness = f"bit-equal: {len(losses['ours'])} losses" if is_equal else "losses DIFFER"
    parts = f"a row {a_row * 1e6:.0f} us, a sample {a_sample * 1e3:.2f} ms, an answer {a_question * 1e3:.2f} ms"
    return [
        Row(
            "a training step that is watched: the CPU time of all parts added to the step's",
            "CPU s",
            theirs * (1 + share),
            theirs,
            None if quick else GOAL,
            exactness,
            f"{parts}; samples every {SAMPLES_S:g} s and questions every {QUESTIONS_S:g} s: {share:.3%} of the step",
        ),
        Row(
            f"a training step that is watched, {OFTENER} times as often as by default: with and without, alternated",
            "CPU s",
            mine,
            theirs,
            None,
            exactness,
            f"{repeats} times {steps} steps of each; ratios scatter from {min(ratios):.3f} to {max(ratios):.3f}",
        ),
    ]


class _Watching:
    """The sink of a run with everything on, and somebody who asks it."""

    def __init__(self, work: Path, *, is_asked: bool = True, every_s: float = SAMPLES_S / OFTENER) -> None:
        from mgm_exp.compose import compose
        from mgm_exp.monitor import MonitorSink
        from mgm_exp.record import RunInfo

        folder = work / "watched"
        folder.mkdir(exist_ok=True)
        config = compose(
            [f"paths.root={work / 'outputs'}", f"monitor.every_s={every_s}", f"monitor.prometheus_port={PORT}"]
        )
        self.sink = MonitorSink(config, folder)
        self.sink.start(RunInfo("bench-1-ab", folder, "bench", None, "run", ()))
        self.sink.stage_started("instruct", 1000, [])
        self.asking: subprocess.Popen[bytes] | None = None
        if is_asked:
            url, pause = f"http://127.0.0.1:{PORT}/metrics", str(QUESTIONS_S / OFTENER)
            self.asking = subprocess.Popen([sys.executable, "-S", "-c", _ASKS, url, pause])

    def row(self, step: int, loss: float) -> None:
        row: dict[str, Any] = {"stage": "instruct", "step": step, "loss": loss, "grad_norm": 1.0 + step % 7, "lr": 1e-4}
        self.sink.row({**row, "tokens_per_s": 1000.0, "samples_per_s": 8.0, "seconds": step / 5, "data_wait_s": 0.0})

    def close(self) -> None:
        if self.asking is not None:
            self.asking.kill()
            self.asking.wait()
        self.sink.finish({"status": "completed"})


def _parts(work: Path, rows: int) -> tuple[float, float, float]:
    """CPU seconds of a row, of a sample, and of an answer with its request."""
    import urllib.request

    watching = _Watching(work, is_asked=False, every_s=1000.0)
    machine = watching.sink._machine()
    url = f"http://127.0.0.1:{PORT}/metrics"
    a_row = _median(lambda step: watching.row(step, 2.0 + step % 5), rows, time.thread_time)
    a_sample = _median(lambda step: machine.sample(time.time()), rows // 10, time.thread_time)
    a_question = _median(lambda step: urllib.request.urlopen(url).read(), rows // 20, time.process_time)
    watching.close()
    return a_row, a_sample, a_question


def _median(work: Callable[[int], object], times: int, clock: Callable[[], float]) -> float:
    """CPU seconds of a call: the median of five batches, for the clock is coarse and others are at work."""
    batches = []
    for _ in range(5):
        began = clock()
        for step in range(times // 5):
            work(step)
        batches.append((clock() - began) / (times // 5))
    return statistics.median(batches)
