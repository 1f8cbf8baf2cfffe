"""The instruct stage of a trial as ours trains it, alone in a process: its steps and its memory, nothing else.

    python -m benchmarks.peers.our_stage JOB.json RESULT.json

``JOB.json`` is a :class:`mgm_exp.train.TrainJob`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from mgm_exp.bootstrap import PARENT
from mgm_exp.store import die_with_parent


def main(job_file: str, result_file: str) -> None:
    """Trains it."""
    import torch

    from benchmarks.memory import above_now, peak_reset
    from mgm_exp.train import TrainJob, run_stage

    torch.set_num_threads(1)
    job = TrainJob.from_json(Path(job_file).read_text(encoding="utf-8"))
    found: dict[str, Any] = {"losses": [], "step_s": []}
    last = 0.0

    def loaded(*_: Any) -> None:
        nonlocal last
        found["base_mib"] = peak_reset()
        last = time.process_time()

    def row(line: dict[str, Any]) -> None:
        nonlocal last
        if "event" in line:
            return
        now = time.process_time()
        found["losses"].append(line["loss"])
        found["step_s"].append(now - last)
        last = now

    run_stage(job, on_start=loaded, on_row=row)
    found["above_mib"] = above_now(found["base_mib"])
    Path(result_file).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    die_with_parent(parent_pid=int(os.environ[PARENT]))
    main(*sys.argv[1:])
