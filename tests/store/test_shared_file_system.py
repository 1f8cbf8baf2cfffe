"""The store on a file system of two machines: late news, locks that end at the machine, clocks that are wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mgm_exp.store import verify
from tests.fault_table import met
from tests.shared_mounts import Host, two_hosts, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

LATE_S = 1.0
TTL_S = 4.0
DAY_S = 86_400.0

PRODUCE = f"""
import sys, time
from pathlib import Path
from mgm_exp.store import Store, write_atomic
folder, key, seconds, name = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4]
store = Store(folder / "store", ttl_s={TTL_S})
print("absent" if store.entry("stage", key) is None else "there", flush=True)
sys.stdin.readline()

def make(work):
    with open(folder / f"made-{{key}}-by-{{name}}", "x"):
        print("making", flush=True)
    time.sleep(seconds)
    write_atomic(work / "out" / "value.txt", name)

output = store.produce("stage", key, make, inputs={{}})
print((output.path / "value.txt").read_text(), output.reused, flush=True)
"""

COUNT = f"""
import os, sys
from pathlib import Path
from mgm_exp.store import Lease
folder, times = Path(sys.argv[1]), int(sys.argv[2])
for _ in range(times):
    with Lease(folder / "lease", ttl_s={TTL_S}) as lease:
        # The counter's steps are names, not contents: what is counted is owners, not what a cache says of a file.
        done = [int(name) for name in os.listdir(folder / "steps")]
        os.mkdir(folder / "steps" / str(max(done, default=0) + 1))
        lease.check()
"""

COLLECT = f"""
import sys
from pathlib import Path
from mgm_exp.store import Store
print([item.kind for item in Store(Path(sys.argv[1]) / "store", ttl_s={TTL_S}).gc()])
"""


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    with two_hosts(tmp_path, late_s=LATE_S) as pair:
        yield pair


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def end(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return output.strip()


def made(hosts: tuple[Host, Host]) -> list[str]:
    return sorted(path.name for path in (hosts[0].folder.parent / "server").glob("made-*"))


def test_what_the_other_host_made_while_one_waited_is_not_made_again(hosts: tuple[Host, Host]) -> None:
    first = hosts[0].start(PRODUCE, "k", 1.5, "a")
    assert said(first) == "absent"
    second = hosts[1].start(PRODUCE, "k", 0, "b")
    go(first)
    assert said(first) == "making"
    assert said(second) == "absent"  # from here on its mount believes so for a while
    go(second)
    assert end(first) == "a False"
    assert end(second) == "a True"
    assert made(hosts) == ["made-k-by-a"]


def test_only_one_host_at_a_time_holds_a_lease(hosts: tuple[Host, Host]) -> None:
    (hosts[0].folder / "steps").mkdir()
    time.sleep(LATE_S)
    counters = [host.start(COUNT, 5) for host in hosts for _ in range(2)]
    for counter in counters:
        end(counter)
    assert len(os.listdir(hosts[0].folder.parent / "server" / "steps")) == 20


def test_an_owner_on_the_other_host_that_only_slept_cannot_publish(hosts: tuple[Host, Host]) -> None:
    sleeper = hosts[0].start(PRODUCE, "k", 1.0, "a")
    said(sleeper)
    go(sleeper)
    assert said(sleeper) == "making"
    sleeper.send_signal(signal.SIGSTOP)
    try:
        other = hosts[1].start(PRODUCE, "k", 0, "b")
        said(other)
        go(other)
        assert end(other) == "making\nb False"
    finally:
        sleeper.send_signal(signal.SIGCONT)
    output, errors = sleeper.communicate(timeout=60)
    assert sleeper.returncode != 0 and "LeaseLost" in errors, output + errors
    server = hosts[0].folder.parent / "server" / "store" / "stage"
    assert (server / "k" / "value.txt").read_text() == "b" and verify(server / "k") == []


@pytest.mark.parametrize("offset_s", [-2 * DAY_S, 40 * DAY_S], ids=["slow", "fast"])
def test_a_host_with_a_wrong_clock_takes_over_from_nobody_and_drops_nothing_that_is_used(
    tmp_path: Path, offset_s: float
) -> None:
    with two_hosts(tmp_path, late_s=0, offset_s=offset_s) as hosts:
        owner = hosts[0].start(PRODUCE, "k", 1.0, "a")
        said(owner)
        go(owner)
        assert said(owner) == "making"
        assert end(hosts[1].start(COLLECT)) == "[]"  # neither the work that is under way
        wrong = hosts[1].start(PRODUCE, "k", 0, "b")
        said(wrong)
        go(wrong)
        assert end(owner) == "a False"
        assert end(wrong) == "a True"
        assert end(hosts[1].start(COLLECT)) == "[]"  # nor what was just used
        os.utime(tmp_path / "server" / "store" / "stage" / "k", (0, 0))
        assert end(hosts[1].start(COLLECT)) == "['entry']"
    met("other clock", 1)
