from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mgm_exp.data import ImageChecks
from mgm_exp.data.image_checks import Verdict

from .conftest import picture


@pytest.fixture
def many(tmp_path: Path) -> tuple[Path, list[str]]:
    """120 pictures, every tenth damaged."""
    names = [f"{i:03d}.png" for i in range(120)]
    for i, name in enumerate(names):
        picture(8, 8, seed=i).save(tmp_path / name)
        if i % 10 == 3:
            (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[: 40 + i])
    return tmp_path, names


def verdicts(root: Path, names: list[str], workers: int) -> list[Verdict]:
    with ImageChecks(root, 50, workers) as checks:
        checks.begin(names[:70])
        checks.begin(names)
        return [checks.verdict(name) for name in names]


def test_verdicts_do_not_depend_on_the_number_of_processes(many: tuple[Path, list[str]]) -> None:
    root, names = many
    alone = verdicts(root, names, 0)
    assert verdicts(root, names, 2) == alone
    bad = [i for i, verdict in enumerate(alone) if verdict.kind is not None]
    assert bad == list(range(3, 120, 10))
    assert len({verdict.sha256 for verdict in alone if verdict.kind is None}) == 108


def test_processes_are_started_only_for_what_takes_long(
    many: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, names = many
    with ImageChecks(root, 50) as checks:
        checks.begin(names)
        assert checks._pool is None and len(checks) == len(names)
        soon = [checks.verdict(name) for name in names]
    monkeypatch.setattr("mgm_exp.data.image_checks._SOON_S", 1e-6)
    monkeypatch.setattr("mgm_exp.data.image_checks.usable_cores", lambda: 2)
    with ImageChecks(root, 50) as checks:
        checks.begin(names)
        assert checks._pool is not None and len(checks) == 16, "a pack, to see how long they take"
        assert [checks.verdict(name) for name in names] == soon


def test_an_image_is_checked_once(root: Path) -> None:
    with ImageChecks(root, 50, 0) as checks:
        first = checks.verdict("0.png")
        os.remove(root / "0.png")
        checks.begin(["0.png"])
        assert checks.verdict("0.png") == first and len(checks) == 1


CHILD = """
import sys, time
from mgm_exp.data import ImageChecks
if __name__ == "__main__":
    with ImageChecks(sys.argv[1], 50, 2) as checks:
        checks.begin(sys.argv[2:])
        checks.verdict(sys.argv[2])
        print(*checks._pool._processes, flush=True)
        time.sleep(60)
"""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and the kernel's parent-death signal")
def test_checking_processes_end_with_their_killed_parent(many: tuple[Path, list[str]], tmp_path: Path) -> None:
    root, names = many
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    parent = subprocess.Popen(
        [sys.executable, str(script), str(root), *names], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert parent.stdout is not None
    children = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(children) == 2 and all(map(is_running, children))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 120
    while any(map(is_running, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, children))
