"""The same promises, with the fault delivered by the kernel at each system call that changes a disk (needs strace).

The harness in ``crash_points`` sees what the store does through ``os``; this one also sees what the interpreter and the
libraries do on the way. strace injects a fault at the 60th call of a kind, counted for each process anew. One traced
process forks a child for each point, and the child first wastes 59, 58, ... such calls, so that the fault meets the
first, second, ... real one: no interpreter has to start again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mgm_exp.store import Store, newest_whole, seal

from .real_processes import REPOSITORY

NTH = 60

# Checkpoint 4 over 1..3, keeping two; then a stage of the store. Says what it promises.
SCENARIO = """
import os, sys, traceback
from pathlib import Path
from mgm_exp.store import Store, prune, publish_folder, remove_folder, write_atomic

def scenario(root):
    checkpoints = root / "checkpoints"
    unfinished = checkpoints / "step-4.tmp"
    unfinished.mkdir()
    write_atomic(unfinished / "weights", b"4" * 5000)
    with open(unfinished / "log", "w") as file:
        for line in range(3):
            file.write("x" * 3000)
            file.flush()
    publish_folder(unfinished, checkpoints / "step-4")
    print("committed", flush=True)
    prune(checkpoints, 2)

    def make(work):
        (work / "out" / "result").write_text("right")
        return {}

    Store(root / "store").produce("align", "key", make, inputs={})
    print("published", flush=True)

nowhere, null, here = "/nowhere/at/all", os.open("/dev/null", os.O_WRONLY), os.open("/", os.O_RDONLY)
WASTE = {
    "write": lambda: os.write(null, b"x"),
    "fsync": lambda: os.fsync(null),
    "rename": lambda: os.rename(nowhere, nowhere),
    "unlink": lambda: os.unlink(nowhere),
    "unlinkat": lambda: os.unlink("nowhere", dir_fd=here),
    "rmdir": lambda: os.rmdir(nowhere),
    "mkdir": lambda: os.mkdir(nowhere),
    "linkat": lambda: os.link(nowhere, nowhere),
    "utimensat": lambda: os.utime(nowhere),
    "chmod": lambda: os.chmod(nowhere, 0),
}

def child(root, call, number):
    for _ in range(60 - number):
        try:
            WASTE[call]()
        except OSError:
            pass
    try:
        scenario(Path(root))
    except BaseException:
        sys.stderr.write(traceback.format_exc())
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)

for line in sys.stdin:
    root, call, number = line.split()
    pid = os.fork()
    if pid == 0:
        child(root, call, int(number))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.writev(1, [f"\\nended {code}\\n".encode()])  # another system call than those that are counted
"""
CALLS = ["write", "fsync", "rename", "unlink", "unlinkat", "rmdir", "mkdir", "linkat", "utimensat", "chmod"]


@pytest.fixture(scope="module")
def strace() -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    probe = subprocess.run(["strace", "-f", "-qq", "-o", os.devnull, "true"], capture_output=True)
    if probe.returncode != 0:
        pytest.skip(f"strace may not trace here: {probe.stderr.decode().strip()}")


def each_point(folder: Path, calls: list[str], fault: str) -> Iterator[tuple[str, int, str]]:
    """Runs the scenario with the fault at the first, second, ... of each call, until it was not killed any more.

    An error, unlike a kill, may be survived: then the first 30 points are tried.

    Yields the point, the exit code and what was said.
    """
    traced = ",".join(f"?{call}" for call in calls)
    command = [
        "strace",
        "-f",
        "-qq",
        "-o",
        os.devnull,
        "-e",
        f"trace={traced}",
        "-e",
        f"inject={traced}:{fault}:when={NTH}",
    ]
    server = subprocess.Popen(
        [*command, sys.executable, "-S", "-B", "-c", SCENARIO],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert server.stdin is not None and server.stdout is not None
    with server:
        for call in calls:
            for number in range(1, NTH if "SIGKILL" in fault else 31):
                prepare(folder)
                server.stdin.write(f"{folder} {call} {number}\n")
                server.stdin.flush()
                said = ""
                while not (line := server.stdout.readline()).startswith("ended"):
                    assert line, f"the traced process itself ended: {said}"
                    said += line
                yield f"{call} {number}", int(line.split()[1]), said
                if line == "ended 0\n" and "SIGKILL" in fault:
                    break
            assert line == "ended 0\n", f"too many calls of {call}: the scenario is too long for this harness"


def prepare(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for step in (1, 2, 3):
        checkpoint = folder / "checkpoints" / f"step-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "weights").write_bytes(str(step).encode() * 5000)
        seal(checkpoint)


def check(folder: Path, point: str, said: str) -> None:
    found, _ = newest_whole(folder / "checkpoints")
    assert found is not None, point
    step = int(found.name.removeprefix("step-"))
    assert (found / "weights").read_bytes() == str(step).encode() * 5000, point
    assert step == 4 or (step == 3 and "committed" not in said), point
    entry = Store(folder / "store").entry("align", "key", verify=True)
    assert entry is None or (entry.path / "result").read_text() == "right", point
    assert entry is not None or "published" not in said, point
    assert entry is not None or not (folder / "store" / "align" / "key").exists(), point


def test_killed_at_each_system_call_nothing_committed_is_lost(tmp_path: Path, strace: None) -> None:
    points = []
    for point, code, said in each_point(tmp_path / "root", CALLS, "signal=SIGKILL"):
        assert code in (0, -9), (point, said)
        check(tmp_path / "root", point, said)
        points += [point] if code else []
    assert len(points) >= 80, points


@pytest.mark.parametrize(
    ("call", "fault", "word"), [("write", "ENOSPC", "No space"), ("fsync", "EIO", "Input/output error")]
)
def test_an_error_at_each_system_call_is_reported_and_loses_nothing(
    tmp_path: Path, strace: None, call: str, fault: str, word: str
) -> None:
    points = []
    for point, code, said in each_point(tmp_path / "root", [call], f"error={fault}"):
        check(tmp_path / "root", point, said)
        assert code == 0 or (code == 1 and word in said), (point, said)
        assert [path.name for path in (tmp_path / "root").rglob(".tmp-*")] == [], point
        points += [point] if code else []
    assert len(points) >= 7, points
