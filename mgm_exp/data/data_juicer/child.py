"""The process that Data-Juicer runs in: started, listened to, and never left behind.

Data-Juicer redirects the output of its process, sets variables of its environment and changes libraries for everyone
in it, so it never runs in ours. What it prints goes to a log file; results are files; a pipe tells which are finished.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import mgm_exp
from mgm_exp.data.data_juicer.guards import BLOCKED, OFFLINE, UNSET
from mgm_exp.errors import ConfigError, DataError, MgmError, MissingDependencyError, ModelError
from mgm_exp.store import write_json_atomic

LOG = "data_juicer.log"
_JOB = "job.json"
_GRACE_S = 10.0  # Ray takes its own processes down when asked to end
_LAST_LINES = 15
_ERRORS = {kind.__name__: kind for kind in (ConfigError, DataError, MissingDependencyError, ModelError)}


def messages(job: dict[str, Any], work: Path) -> Iterator[dict[str, Any]]:
    """Runs the worker on a job and gives its messages, one for each finished shard.

    Args:
        job: Plain data, see :mod:`.worker`.
        work: Existing folder: the job, Data-Juicer's log and its own files.

    Raises:
        MgmError: Data-Juicer failed; the message ends with the last lines of its log.
        DataError, MissingDependencyError, ...: the worker knows why.
    """
    if any(character in str(work.resolve()) for character in "{}"):
        raise ConfigError(
            f"Data-Juicer cannot work in {work}: it takes braces in paths for placeholders.",
            advice="Set paths.root or paths.store to a path without { and }.",
        )
    write_json_atomic(work / _JOB, job)
    with open(work / LOG, "ab") as log:
        start_of_log = log.tell()
        with _worker(work, log) as (process, pipe):
            failure: dict[str, Any] | None = None
            for line in pipe:
                message = json.loads(line)
                if "error" in message:
                    failure = message
                else:
                    yield message
            code = process.wait()
    if failure is not None or code != 0:
        raise _error(failure, code, work / LOG, start_of_log)


def environment() -> dict[str, str]:
    """The worker's: offline, and without the variables that would change what Data-Juicer does."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in UNSET and not name.startswith("_DJ_SPECIAL_TOKEN_")
    }
    # The package may run from a checkout, in whose folder the worker is not started.
    package = str(Path(mgm_exp.__file__).resolve().parents[1])
    paths = [package, *filter(None, [inherited.get("PYTHONPATH")])]
    return {**inherited, **OFFLINE, "PYTHONPATH": os.pathsep.join(paths)}


@contextmanager
def _worker(work: Path, log: IO[bytes]) -> Iterator[tuple[subprocess.Popen[bytes], IO[str]]]:
    """The started process and the pipe that its messages come from; both are gone afterwards."""
    reading, writing = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "mgm_exp.data.data_juicer.worker", _JOB, str(writing), str(os.getpid())],
            cwd=work,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[writing],
            start_new_session=True,  # Ctrl-C is for us; we tell it
        )
    except BaseException:
        os.close(reading)
        raise
    finally:
        os.close(writing)
    with open(reading, encoding="utf-8") as pipe:
        try:
            yield process, pipe
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the worker and whatever it has started."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _error(failure: dict[str, Any] | None, code: int, log: Path, start: int) -> MgmError:
    if failure is not None and failure["error"] in _ERRORS:
        return _ERRORS[failure["error"]](failure["message"], advice=failure["advice"])
    if failure is not None and BLOCKED in failure["message"]:
        package = failure["message"].partition(f"{BLOCKED}: ")[2].split()[0]
        return MissingDependencyError(
            f"Data-Juicer needs the package {package}, which is not installed.",
            advice=f"Run `pip install {package}`; it is not installed behind your back.",
        )
    if failure is not None:
        what = f"Data-Juicer failed: {failure['error']}: {failure['message']:.600}."
    elif code < 0:
        what = f"Data-Juicer's process was ended by {signal.Signals(-code).name}."
        if code == -signal.SIGKILL:
            what += " The machine may have run out of memory."
    else:
        what = f"Data-Juicer's process ended with exit code {code}."
    return MgmError(f"{what}\nThe last lines of {log}:\n{_tail(log, start)}")


def _tail(log: Path, start: int) -> str:
    with open(log, "rb") as file:
        file.seek(start)
        lines = file.read()[-20_000:].decode("utf-8", "replace").splitlines()
    return "\n".join(f"  {line.rstrip():.300}" for line in lines[-_LAST_LINES:] if line.strip())
