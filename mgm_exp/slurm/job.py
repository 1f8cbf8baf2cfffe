"""What runs on the first node of a job: one process that starts the run, hears signals, and puts the job back in line.

    python job.py SUBMISSION -- PROGRAM

It takes its task from ``SUBMISSION/submission.json`` (by the number in the array), adds its overrides to the program,
and starts that. It is a file of its own, with nothing but the standard library, because with a container it runs
outside of it, in whatever Python the node has.

Signals. Slurm warns the batch script before the time is up (``--signal=B:USR2``); a preemption, ``scancel`` and the end
of the time send SIGTERM to every process; ``scancel --signal`` reaches the steps of a job only, never its script. So a
step is held open whose one purpose is to hear signals and to pass them on to this process, which tells the run once.
The run saves its state and ends with 130. Then:

    Slurm itself is ending the job      nothing to do: it requeues what is preempted, and cancels what was cancelled
    the user's sweep asked for the stop this is the end; the same command continues
    otherwise                           ``scontrol requeue``: it continues from its checkpoint, in the same folder
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from types import FrameType
from typing import Any

INTERRUPTED = 130
DONE = ("completed", "pruned")
STOPS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
# A shell that passes signals on to a process ($0), and ends with it. After SIGTERM it is not needed any more: if it
# stayed, the node would not be free before Slurm's KillWait is over.
_RELAY = (
    'for s in USR1 USR2 INT; do trap "kill -$s $0 2>/dev/null" $s; done; '
    "trap 'kill -TERM $0 2>/dev/null; exit' TERM; "
    "while kill -0 $0 2>/dev/null; do sleep 5 & wait $!; done"
)
_ASK_EVERY_S = 5.0
_ASK_FOR_S = 900.0


class Job:
    """This job's task; see the module.

    Args:
        folder: Of the submission.
        program: Runs one experiment, without its overrides.
    """

    def __init__(self, folder: str, program: list[str]) -> None:
        self.folder, self.program = folder, program
        self.submission = _read(os.path.join(folder, "submission.json"))
        self.index = int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))
        self.task: dict[str, Any] = self.submission["tasks"][self.index]
        self.run_dir: str = self.task["run_dir"]
        self.heard: str | None = None
        self.is_over = False
        self.child: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Runs the task to its end, or to where it is interrupted; the exit code."""
        for number in (*STOPS, signal.SIGCONT):
            signal.signal(number, self._hear)
        os.makedirs(self.run_dir, exist_ok=True)
        output = os.open(os.path.join(self.run_dir, "output.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(output, 1)
        os.dup2(output, 2)
        self._note("started", {"job_id": _job_id(), "node": os.environ.get("SLURMD_NODENAME", ""), "at": time.time()})
        print(f"--- job {_job_id()} on {os.environ.get('SLURM_JOB_NODELIST', '?')}, {self._times()}", flush=True)
        if not self._is_ours():
            print("--- another job has taken this run over; nothing is done here", flush=True)
            return 0
        if self._is_done():
            print("--- the run is completed already", flush=True)
            return self._end(0)
        if self._is_stopped():
            return self._end(INTERRUPTED, reason="stopped with its sweep")
        code = self._run()
        if code != INTERRUPTED or self._is_done():
            return self._end(code)
        return self._interrupted()

    def _run(self) -> int:
        """The run's exit code; negative: the signal that killed it."""
        relay = self._start_relay()
        environment = dict(os.environ, MGM_EXP_STOP_ONCE="1", MGM_EXP_WAIT="1")
        if not self.submission.get("container"):
            environment["MGM_EXP_PARENT"] = str(os.getpid())
        if self.heard is not None:
            return INTERRUPTED
        self.child = subprocess.Popen(
            [*self.program, *self.task["overrides"]], env=environment, stdin=subprocess.DEVNULL
        )
        if self.heard is not None:  # it came between the two lines
            self.child.send_signal(signal.SIGTERM)
        code = self.child.wait()
        self.is_over = True
        if relay is not None:
            relay.terminate()
            try:
                relay.wait(2.0)
            except subprocess.TimeoutExpired:
                relay.kill()
        if code > 128:  # what a container's runtime says of a signal
            code = INTERRUPTED if code == INTERRUPTED else 128 - code
        # Before its handlers are in place a signal simply ends it; nothing was begun then.
        return INTERRUPTED if -code in STOPS else code

    def _start_relay(self) -> subprocess.Popen[bytes] | None:
        """The step that hears what ``scancel --signal`` says to the job. Without it the run goes on all the same."""
        options = "--overlap --nodes=1 --ntasks=1 --cpus-per-task=1 --mem=0 --gres=none --quiet --input=none".split()
        node = os.environ.get("SLURMD_NODENAME")
        options += [f"--nodelist={node}"] if node else []
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM_GPUS", "SLURM_MEM", "SLURM_CPUS_PER", "SLURM_TRES", "SLURM_NTASKS"))
        }
        try:
            return subprocess.Popen(
                ["srun", *options, "bash", "-c", _RELAY, str(os.getpid())],
                env=inherited,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            print(f"--- srun cannot be started ({error}); scancel --signal will not be heard", flush=True)
            return None

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGCONT or self.heard is not None or self.is_over:
            return
        self.heard = signal.Signals(number).name
        os.write(1, f"--- {self.heard}: the run is asked to save its state and to end\n".encode())
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(number)

    # -- what an interruption means ------------------------------------------------------------------------------

    def _interrupted(self) -> int:
        if self._is_stopped():
            return self._end(INTERRUPTED, reason="stopped with its sweep")
        state = _state_of_this_job()
        if state != "RUNNING":
            print(f"--- the state is saved; the job is {state}", flush=True)
            return INTERRUPTED
        counter = os.path.join(self.folder, "requeued", str(self.index))
        before = int(_text(counter) or 0)
        is_counted = self.heard != "SIGTERM"  # a preemption is nobody's fault; a time that does not suffice may be
        most = int(self.submission["max_requeues"])
        if is_counted and before >= most:
            return self._end(
                INTERRUPTED,
                reason=f"its state is saved, but it was put back into the queue {before} time(s) already "
                f"(hydra.launcher.max_requeues={most})",
            )
        if is_counted:
            _write(counter, str(before + 1))
        print("--- the state is saved; the job goes back into the queue", flush=True)
        refused = _requeue()
        if refused:
            return self._end(INTERRUPTED, lost=True, reason=f"Slurm does not put the job back: {refused}")
        time.sleep(60)  # Slurm ends this process
        return INTERRUPTED

    def _is_stopped(self) -> bool:
        """Whether the sweep wants this task to end for good."""
        return os.path.exists(os.path.join(self.folder, "stop", str(self.index)))

    def _is_ours(self) -> bool:
        """Whether this submission is still the run's latest one."""
        latest = _read(os.path.join(self.run_dir, "slurm.json"))
        return not latest or (latest.get("submission"), latest.get("index")) == (self.submission["id"], self.index)

    def _is_done(self) -> bool:
        """Whether the run was completed since it was submitted (by this job before a requeue, or by somebody else)."""
        path = os.path.join(self.run_dir, "result.json")
        try:
            is_fresh = os.stat(path).st_mtime >= float(self.submission["submitted_at"])
        except OSError:
            return False
        return is_fresh and _read(path).get("status") in DONE

    def _end(self, code: int, **facts: Any) -> int:
        """Notes that this task is over for good: whoever waits for it need not ask Slurm."""
        self._note("ended", {"exit_code": code, "heard": self.heard, "job_id": _job_id(), **facts})
        return code if code >= 0 else 128 - code

    def _note(self, what: str, content: dict[str, Any]) -> None:
        _write(os.path.join(self.folder, what, f"{self.index}.json"), json.dumps(content))

    def _times(self) -> str:
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        return f"restarted {restarts} time(s)" if restarts else "first start"


def _job_id() -> str:
    """``12``, or ``12_3``: the plain number of a task (SLURM_JOB_ID) may be that of the whole array, too."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID", "")


def _state_of_this_job() -> str:
    """RUNNING where Slurm has nothing against the job going on; waits while the controller is away."""
    until = time.monotonic() + _ASK_FOR_S
    while True:
        done = _call(["squeue", "--noheader", f"--jobs={_job_id()}", "--format=%T"])
        if done.returncode == 0:
            return done.stdout.strip() or "COMPLETING"
        if "Invalid job id" in done.stderr:
            return "not known to Slurm any more"
        if time.monotonic() > until:
            return f"unknown ({done.stderr.strip()})"
        time.sleep(_ASK_EVERY_S)


def _requeue() -> str:
    """Puts this job back in line; why Slurm refuses, or nothing. Waits while the controller is away."""
    until = time.monotonic() + _ASK_FOR_S
    while True:
        done = _call(["scontrol", "requeue", _job_id()])
        if done.returncode == 0:
            return ""
        is_away = any(word in done.stderr for word in ("contact", "timed out", "Connection", "Zero Bytes"))
        if not is_away or time.monotonic() > until:
            return done.stderr.strip() or f"scontrol ended with {done.returncode}"
        time.sleep(_ASK_EVERY_S)


def _call(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return ""


def _read(path: str) -> dict[str, Any]:
    try:
        content = json.loads(_text(path) or "{}")
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: str, text: str) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    beside = f"{path}.{os.getpid()}.tmp"
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def main(arguments: list[str]) -> int:
    """``SUBMISSION -- PROGRAM``: the exit code."""
    folder, dashes, *program = arguments
    if dashes != "--" or not program:
        raise SystemExit(f"usage: job.py SUBMISSION -- PROGRAM, not {arguments}")
    return Job(folder, program).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
