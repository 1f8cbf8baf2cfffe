"""A run that is watched for real, with faults on demand: ``python -m tests.monitor.faulty_run FAULTS OVERRIDES...``.

FAULTS is a JSON list of names in a file, read before each of its steps, ten a second. Everything is what a run has,
but the numbers of its rows and, where a fault says so, the readings of its machine (a GPU of its own among them).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from mgm_exp.compose import compose
from mgm_exp.monitor import MonitorSink
from mgm_exp.monitor.machine import Machine
from mgm_exp.record import RunInfo

FAULTS = ("nan", "spike", "memory", "disk", "slow", "idle", "stall", "end")


class FaultyMachine(Machine):
    """This machine with a GPU, whose readings and disks follow the faults."""

    faults: frozenset[str] = frozenset()

    def sample(self, now: float) -> dict[str, Any]:
        """See :meth:`Machine.sample`."""
        found = super().sample(now)
        use, used = 0.0 if "idle" in self.faults else 0.95, 79.0 if "memory" in self.faults else 40.0
        found["gpus"] = [{"index": 0, "memory_used_gib": used, "memory_total_gib": 80.0, "utilization": use}]
        free = 0.01 if "disk" in self.faults else 500.0
        found["disks"] = {"root": {"free_gib": free, "total_gib": 1000.0}}
        return found


class FaultySink(MonitorSink):
    """A sink on such a machine."""

    def _machine(self) -> Machine:
        self.machine = FaultyMachine({})
        return self.machine


def main(orders: Path, overrides: list[str]) -> None:
    """Trains, in a manner of speaking, until the fault ``end``."""
    config = compose(overrides)
    run_dir = orders.parent / "run"
    run_dir.mkdir(exist_ok=True)
    sink = FaultySink(config, run_dir)
    sink.start(RunInfo("faulty-1-ab", run_dir, "faulty", None, "run", ()))
    sink.stage_started("instruct", 100_000, [])
    step, began = 0, time.time()
    while "end" not in (faults := frozenset(json.loads(orders.read_text()))):
        sink.machine.faults = faults
        if "stall" not in faults:
            step += 1
            row: dict[str, Any] = {"stage": "instruct", "step": step, "loss": 2.0, "grad_norm": 1.0, "lr": 1e-4}
            row |= {"seconds": time.time() - began, "tokens_per_s": 100.0 if "slow" in faults else 1000.0}
            if "nan" in faults:
                row |= {"event": "not_finite", "loss": None, "grad_norm": None}
            elif "spike" in faults and step % 20 == 0:
                row["grad_norm"] = 60.0
            sink.row(row)
        time.sleep(0.1)  # the pace of its steps
    sink.stage_finished("instruct", {}, False)
    sink.finish({"status": "completed"})


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
