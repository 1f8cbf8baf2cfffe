"""One process of a stage that runs in several: ``python -m mgm_exp.train.worker LAUNCH_FOLDER``.

Started by an agent (:mod:`mgm_exp.train.agent`) through torch's elastic launcher, which sets RANK, WORLD_SIZE, ...
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from mgm_exp.errors import Interrupted, MgmError, Pruned
from mgm_exp.store import die_with_parent, hold_shared, write_json_atomic
from mgm_exp.train.agent import AGENT
from mgm_exp.train.failures import is_secondary
from mgm_exp.train.job import TrainJob
from mgm_exp.train.launch_folder import POLL_S, STOP, LaunchFacts, LaunchFolder
from mgm_exp.train.listener import Listener
from mgm_exp.train.pulse import Marks, Pulse, beat_s
from mgm_exp.train.stop import StopRequest


def main(folder: Path) -> int:
    """Trains as one of the processes; how it ended is written to ``outcome-<rank>.json``.

    Returns:
        The exit code: 0 also after an interruption, which all processes take part in.
    """
    faulthandler.enable()
    launch = LaunchFolder(folder)
    facts = LaunchFacts.read(launch.facts)
    die_with_parent(parent_pid=int(os.environ[AGENT]))
    if facts.lease:
        hold_shared(facts.lease, facts.token)
    job = TrainJob.from_json(launch.job.read_text(encoding="utf-8"))
    rank = int(os.environ["RANK"])
    launch.pid(rank).write_text(str(os.getpid()), encoding="ascii")
    marks = Marks()
    pulse = Pulse(launch.pulse(rank), marks, beat_s(facts.timeout_s), launch.stacks)
    pulse.start()
    outcome, code = _train(job, launch, rank, facts.timeout_s, marks)
    pulse.end()
    write_json_atomic(launch.outcome(rank), {**outcome, "time": time.time()})
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _train(
    job: TrainJob, launch: LaunchFolder, rank: int, timeout_s: float, marks: Marks
) -> tuple[dict[str, Any], int]:
    try:
        with StopRequest(file=launch.stop if rank == 0 else None).listening() as stop:
            from mgm_exp.train.loop import train_stage
            from mgm_exp.train.ranks import Ranks

            ranks = Ranks.join(job.experiment().device, timeout_s, marks)
            listener = _to_file(launch) if rank == 0 else Listener()
            summary = train_stage(job, ranks, listener, stop)
            ranks.leave()
    except Interrupted as error:
        return {"kind": "interrupted", "message": error.message, "advice": error.advice}, 0
    except Pruned as error:
        return {"kind": "pruned", "message": error.message}, 0
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent shows it
        traceback.print_exc()
        message, advice = (error.message, error.advice) if isinstance(error, MgmError) else (str(error), "")
        return {
            "kind": "error",
            "type": type(error).__name__,
            "message": message,
            "advice": advice,
            "secondary": is_secondary(error),
            "traceback": traceback.format_exc(),
        }, 1
    return {"kind": "done", "summary": summary.to_dict()}, 0


def _to_file(launch: LaunchFolder) -> Listener:
    """A listener that writes one line an event, for the parent to follow, and waits for the answers to validations."""

    def tell(kind: str, value: Any) -> None:
        with open(launch.events, "a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "value": value}) + "\n")

    def ask(step: int, value: float) -> bool:
        tell("validation", {"step": step, "value": value})
        answer = launch.answer(step)
        while not answer.exists():  # the parent answers, or this process ends with it
            if launch.stop.exists():
                return False
            time.sleep(POLL_S / 4)
        return answer.read_text(encoding="utf-8") == STOP

    return Listener(
        on_start=lambda total, rows: tell("start", {"total": total, "rows": len(rows)}),
        on_row=lambda row: tell("row", row),
        on_checkpoint=lambda folder: tell("checkpoint", str(folder)),
        say=lambda text: tell("say", text),
        on_validation=ask,
        on_progress=lambda *progress: tell("progress", list(progress)),
    )


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        code = main(Path(sys.argv[1]))
    # DeepSpeed and gloo leave threads behind that may crash at interpreter shutdown; everything is written
    os._exit(code)
