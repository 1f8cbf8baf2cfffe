"""The same promises, with the fault delivered by the kernel at each system call that changes a disk (needs strace).

The harness in ``crash_points`` sees what the store does through ``os``; this one also sees what the interpreter and the
libraries do on the way.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mgm_exp.store import Store, newest_whole, seal
from tests.fault_table import met
from tests.system_calls import CHANGES, Traced, strace_or_skip

SCENARIO = "tests.store.committing:commit"
NTH = 60


@pytest.fixture(scope="module")
def strace() -> None:
    strace_or_skip()


def prepare(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    for step in (1, 2, 3):
        checkpoint = folder / "checkpoints" / f"step-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "weights").write_bytes(str(step).encode() * 5000)
        seal(checkpoint)
    return folder


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
    root, points = tmp_path / "root", []
    with Traced(SCENARIO, CHANGES, nth=NTH) as traced:
        for point, said in traced.each_call(lambda: prepare(root), CHANGES, nth=NTH):
            check(root, point, said)
            points.append(point)
    assert len(points) >= 70, points
    met("kill: store", len(points))


@pytest.mark.parametrize(
    ("call", "fault", "word"), [("write", "ENOSPC", "No space"), ("fsync", "EIO", "Input/output error")]
)
def test_an_error_at_each_system_call_is_reported_and_loses_nothing(
    tmp_path: Path, strace: None, call: str, fault: str, word: str
) -> None:
    root, points = tmp_path / "root", []
    with Traced(SCENARIO, [call], f"error={fault}", nth=NTH) as traced:
        for number in range(1, 31):  # an error, unlike a kill, may be survived: no telling which one is the last
            code, said = traced.run(prepare(root), call, number)
            check(root, f"{call} {number}", said)
            assert code == 0 or (code == 1 and word in said), (call, number, said)
            assert [path.name for path in root.rglob(".tmp-*")] == [], (call, number)
            points += [number] if code else []
    assert len(points) >= 7, points
    met(f"error: {fault}", len(points))
