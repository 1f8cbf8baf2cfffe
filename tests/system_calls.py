"""Not a test: delivers a fault at the first, second, ... system call of a kind, by the kernel (needs strace).

strace injects the fault at the NTH call of a kind, counted for each process anew. One traced process, which has
imported everything, forks a child for each point, and the child first wastes NTH - 1, NTH - 2, ... such calls, so that
the fault meets the first, second, ... real one: no interpreter has to start again.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
# The calls that change a disk.
CHANGES = (
    "write",
    "pwrite64",
    "fsync",
    "fdatasync",
    "rename",
    "unlink",
    "unlinkat",
    "rmdir",
    "mkdir",
    "linkat",
    "ftruncate",
    "utimensat",
    "chmod",
)
KILL = "signal=SIGKILL"


def strace_or_skip() -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    probe = subprocess.run(["strace", "-f", "-qq", "-o", os.devnull, "true"], capture_output=True)
    if probe.returncode != 0:
        pytest.skip(f"strace may not trace here: {probe.stderr.decode().strip()}")


class Traced:
    """Runs a scenario in forked processes, each with the fault at another call.

    Args:
        scenario: ``package.module:function``; called with a folder, in the child.
        calls: some of CHANGES; none: nothing is injected.
        fault: strace's words for it, such as ``signal=SIGKILL`` or ``error=ENOSPC``; None: the calls are only seen.
        nth: more than the scenario makes of these calls.
        log: the calls that are seen are written to ``LOG.<process>``.
    """

    def __init__(
        self,
        scenario: str,
        calls: Sequence[str] = (),
        fault: str | None = KILL,
        nth: int = 60,
        log: Path | None = None,
    ) -> None:
        command = [sys.executable, "-B", "-m", "tests.system_calls", scenario, str(nth)]
        if calls:
            traced = ",".join(f"?{call}" for call in calls)
            inject = ["-e", f"inject={traced}:{fault}:when={nth}"] if fault else []
            written = ["-ff", "-o", str(log)] if log else ["-f", "-o", os.devnull]
            command = ["strace", "-qq", *written, "-e", f"trace={traced}", *inject, *command]
        self.process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, folder: Path, call: str = "-", number: int = 0) -> tuple[int, str]:
        """The scenario with the fault at its ``number``-th ``call`` (0: at none): exit code, and what it said."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{folder} {call} {number}\n")
        self.process.stdin.flush()
        said = ""
        while not (line := self.process.stdout.readline()).startswith("ended"):
            assert line, f"the traced process itself ended: {said}"
            said += line
        return int(line.split()[1]), said

    def each_call(
        self, prepare: Callable[[], Path], calls: Sequence[str], *, nth: int, first: int = 1, every: int = 1
    ) -> Iterator[tuple[str, str]]:
        """Kills the scenario at every ``every``-th of its calls; yields each point and what it had said."""
        for call in calls:
            for number in range(first, nth, every):
                code, said = self.run(prepare(), call, number)
                assert code in (0, -9), (call, number, said)
                if code == 0:
                    break
                yield f"{call} {number}", said
            else:
                raise AssertionError(f"more than {nth} calls of {call}: the scenario is too long for this harness")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def __enter__(self) -> Traced:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def count_calls(scenario: str, folder: Path, calls: Sequence[str] = CHANGES) -> dict[str, int]:
    """How many calls of each kind the scenario makes, of those that it makes at all; it is run once in ``folder``."""
    log = folder.with_name(folder.name + ".calls")
    with Traced(scenario, calls, fault=None, log=log) as counted:
        assert counted.run(folder)[0] == 0
    # One file a process: the one that imported everything has the lowest number, the scenario's own the next
    files = sorted(log.parent.glob(f"{log.name}.*"), key=lambda path: int(path.suffix[1:]))
    made = Counter(line.partition("(")[0] for path in files[1:] for line in path.read_text().splitlines())
    for path in files:
        path.unlink()
    return {call: made[call] for call in calls if made[call]}


def stride(number: int, default: int) -> int:
    """Every how many-th of ``number`` calls is killed at, so that there are at most ``default`` points, spread evenly;
    the environment's CRASH_POINTS asks for another number of them, or for ``all``."""
    asked = os.environ.get("CRASH_POINTS", str(default))
    return 1 if asked == "all" else -(-number // int(asked))


def say(text: str) -> None:
    """Says something by another system call than those that are counted."""
    os.writev(1, [f"\n{text}\n".encode()])


def _wasting() -> dict[str, Callable[[], object]]:
    nowhere, null, here = "/nowhere/at/all", os.open(os.devnull, os.O_WRONLY), os.open("/", os.O_RDONLY)
    return {
        "write": lambda: os.write(null, b"x"),
        "pwrite64": lambda: os.pwrite(null, b"x", 0),
        "fsync": lambda: os.fsync(null),
        "fdatasync": lambda: os.fdatasync(null),
        "rename": lambda: os.rename(nowhere, nowhere),
        "unlink": lambda: os.unlink(nowhere),
        "unlinkat": lambda: os.unlink("nowhere", dir_fd=here),
        "rmdir": lambda: os.rmdir(nowhere),
        "mkdir": lambda: os.mkdir(nowhere),
        "linkat": lambda: os.link(nowhere, nowhere),
        "ftruncate": lambda: os.ftruncate(null, 0),
        "utimensat": lambda: os.utime(nowhere),
        "chmod": lambda: os.chmod(nowhere, 0),
    }


def _serve(scenario: Callable[[Path], None], nth: int) -> None:
    wasting = _wasting()
    for line in sys.stdin:
        folder, call, number = line.split()
        pid = os.fork()
        if pid == 0:
            try:
                for _ in range(nth - int(number) if int(number) else 0):
                    with contextlib.suppress(OSError):
                        wasting[call]()
                scenario(Path(folder))
            except BaseException:  # noqa: BLE001 (a forked child must never return into the loop of its parent)
                say(traceback.format_exc())
                os._exit(1)
            os._exit(0)
        say(f"ended {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}")


if __name__ == "__main__":
    _module, _, _name = sys.argv[1].partition(":")
    _serve(getattr(importlib.import_module(_module), _name), int(sys.argv[2]))
