"""1,000 queued Slurm jobs: what our question about them costs the controller, beside a question for each job.

Needs a Slurm that is running (``SLURM_CONF``) and that one may fill with held jobs: they wait, are counted, and are
cancelled. The peer is what a loop over jobs does. Calls of the controller are counted by the controller (``sdiag``).
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.measurement import Row

JOBS, JOBS_QUICK = 1_000, 20
QUESTIONS = 10
SINGLE = 50  # questions for one job each; the rest is multiplied


def run(work: Path, quick: bool = False) -> list[Row]:
    """Measures single jobs and one array; nothing where there is no Slurm."""
    if shutil.which("squeue") is None or subprocess.run(["squeue", "-h"], capture_output=True).returncode != 0:
        print("no Slurm answers here (SLURM_CONF)", flush=True)
        return []
    jobs = JOBS_QUICK if quick else JOBS
    script = work / "wait.sh"
    script.write_text("#!/bin/sh\nsleep 600\n")
    return [_measure(script, jobs, is_array) for is_array in (True, False)]


def _measure(script: Path, jobs: int, is_array: bool) -> Row:
    slurm = importlib.import_module("mgm_exp.slurm.commands").Slurm()
    submit = ["sbatch", "--parsable", "--hold", "--ntasks=1", "--output=/dev/null"]
    began = time.perf_counter()
    if is_array:
        array = _call([*submit, f"--array=0-{jobs - 1}", str(script)])
        names = [f"{array}_{index}" for index in range(jobs)]
    else:
        names = [_call([*submit, str(script)]) for _ in range(jobs)]
    submitted_s = time.perf_counter() - began
    try:
        before = _rpcs()
        ours = []
        for _ in range(QUESTIONS):
            began = time.perf_counter()
            assert len(slurm.states(names)) == jobs
            ours.append(time.perf_counter() - began)
        between = _rpcs()
        single = []
        for name in names[:SINGLE]:
            began = time.perf_counter()
            _call(["squeue", "--noheader", "--format=%T", f"--jobs={name}"])
            single.append(time.perf_counter() - began)
        after = _rpcs()
    finally:
        subprocess.run(["scancel", *sorted({name.partition("_")[0] for name in names})], check=True)
    n_ours = (between[0] - before[0]) / QUESTIONS
    n_single = (after[0] - between[0]) / len(single) * jobs
    return Row(
        f"{jobs:,} queued Slurm jobs ({'one array' if is_array else 'single jobs'}): calls of slurmctld a question",
        "calls",
        n_ours,
        n_single,
        None,
        f"the states of all {jobs:,} jobs",
        f"answer in {1000 * statistics.median(ours):.0f} ms (longest {1000 * max(ours):.0f}); slurmctld worked "
        f"{(between[1] - before[1]) / QUESTIONS / 1000:.2f} ms on it; one job alone "
        f"{1000 * statistics.median(single):.0f} ms; submitted in {submitted_s:.1f} s",
    )


def _call(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _rpcs() -> tuple[int, int]:
    """Questions for jobs that slurmctld has answered, and the microseconds that it took."""
    text = _call(["sdiag"])
    found = re.findall(r"REQUEST_(?:JOB|PARTITION)_INFO\w*\s*\(.*?count:(\d+)\s+ave_time:\d+\s+total_time:(\d+)", text)
    return sum(int(count) for count, _ in found), sum(int(total) for _, total in found)


if __name__ == "__main__":  # DIR [--quick]
    os.makedirs(sys.argv[1], exist_ok=True)
    for row in run(Path(sys.argv[1]), quick="--quick" in sys.argv):
        print(f"{row.name}: {row.ours:.1f}, {row.peer:.1f}; {row.evidence}")
