"""One writer at a time, whatever dies: real processes, real kills."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mgm_exp.errors import LeaseLost, UserError
from mgm_exp.store import Lease, LeaseHeld, claims, hold_shared, processes, read_json
from tests.fault_table import met

from .crash_points import crash_points, names_below, wait_until
from .real_processes import Child

OWNER = """
import sys
from mgm_exp.store import Lease, LeaseLost
lease = Lease(sys.argv[1], ttl_s=float(sys.argv[2]))
lease.acquire(on_wait=lambda why: print("waiting", why))
print("token", lease.token)
input()
try:
    lease.check()
    print("still mine")
except LeaseLost as error:
    print("lost", error)
lease.release()
"""

# An owner that leaves two kinds of children behind when it is killed.
OWNER_WITH_WORKER = """
import subprocess, sys
from mgm_exp.store import Lease
lease = Lease(sys.argv[1])
lease.acquire()
worker = "import sys; from mgm_exp.store import hold_shared; hold = hold_shared(sys.argv[1]); "
worker += "print('worker', hold.token, flush=True); import time; time.sleep(600)"
child = subprocess.Popen([sys.executable, "-S", "-c", worker, sys.argv[1]])
print("owner", child.pid)
input()
"""
OWNER_WITH_FORK = """
import os, sys, time
from mgm_exp.store import Lease
lease = Lease(sys.argv[1])
lease.acquire()
child = os.fork()
if child == 0:
    time.sleep(600)
print("owner", child)
input()
"""

# Adds one to a number in a file, again and again, in a way that loses counts if anybody else does it at the same time.
# The polling is sped up so that they meet often.
COUNT = """
import random, sys, time
from mgm_exp.store import Lease, lease as module
class Clock:
    monotonic = staticmethod(time.monotonic)
    sleep = staticmethod(lambda seconds: time.sleep(random.random() * 0.003))
module.time = Clock
for _ in range(int(sys.argv[3])):
    time.sleep(random.random() * 0.003)
    lease = Lease(sys.argv[1], ttl_s=60)
    lease.acquire()
    with open(sys.argv[2]) as file:
        value = int(file.read())
    time.sleep(random.random() * 0.002)
    with open(sys.argv[2], "w") as file:
        file.write(str(value + 1))
    lease.check()
    lease.release(forget="--forget" in sys.argv)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / ".lease"


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process sits on another machine than everybody else, and sees no locks."""

    def flock(descriptor: int, kind: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(processes.socket, "gethostname", lambda: "node-here")
    monkeypatch.setattr(claims.fcntl, "flock", flock)
    yield


def tell_apart(path: Path) -> list[str]:
    return [name for name in names_below(path) if name not in ("lock", "workers")]


def test_a_second_process_is_refused_and_told_who_has_it(path: Path) -> None:
    with Child(OWNER, path, 60) as owner:
        assert owner.hear("token") == "token 1"
        with pytest.raises(LeaseHeld, match=f"in use by process {owner.pid} on .*give the same command again"):
            Lease(path).acquire(wait=False)
        held = Lease(path).holder()
        assert held is not None and held.holder is not None and held.holder.pid == owner.pid
        owner.tell()
        assert "still mine" in owner.finish()
    assert Lease(path).holder() is None
    with Lease(path) as lease:
        assert lease.token == 2


def test_kill_9_frees_it_at_once_and_the_token_grows(path: Path) -> None:
    waited: list[str] = []
    with Child(OWNER, path, 3600) as owner:
        owner.hear("token")
        threading.Timer(0.3, owner.kill).start()
        lease = Lease(path, ttl_s=3600)
        lease.acquire(on_wait=waited.append, timeout_s=60)
    assert lease.token == 2 and not lease.took_over_expired
    assert len(waited) == 1 and f"process {owner.pid}" in waited[0]
    lease.check()
    lease.release()


def test_waiting_ends_at_its_limit(path: Path) -> None:
    with Lease(path):
        started = time.monotonic()
        with pytest.raises(LeaseHeld):
            Lease(path).acquire(timeout_s=0.5)
        assert time.monotonic() - started >= 0.5


def test_two_objects_in_one_process_exclude_each_other(path: Path) -> None:
    first, second = Lease(path), Lease(path)
    first.acquire()
    with pytest.raises(LeaseHeld):
        second.acquire(wait=False)
    with pytest.raises(LeaseLost, match="not held"):
        second.check()
    with pytest.raises(RuntimeError, match="already held"):
        first.acquire()
    first.release()
    first.release()
    second.acquire(wait=False)
    second.release()


@pytest.mark.parametrize("option", ["--keep", "--forget"])
@pytest.mark.parametrize("machines", [["", "", ""], ["a", "b", "c"]], ids=["one machine", "three without locks"])
def test_only_one_at_a_time_has_it(path: Path, tmp_path: Path, machines: list[str], option: str) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    children = [Child(COUNT, path, counter, 25, option, elsewhere=machine) for machine in machines]
    for child in children:
        child.finish()
    assert counter.read_text() == str(25 * len(children))
    assert Lease(path).holder() is None


def test_a_number_is_claimed_by_one_only_with_hard_links_and_without(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.mkdir(parents=True)
    assert claims.create_once(path / "claim-000001.json", b"first")
    assert not claims.create_once(path / "claim-000001.json", b"second")

    def no_links(source: Path, target: Path) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(claims.os, "link", no_links)
    assert not claims.create_once(path / "claim-000001.json", b"third")
    assert claims.create_once(path / "claim-000002.json", b"fourth")
    assert [(path / name).read_bytes() for name in names_below(path)] == [b"first", b"fourth"]


def test_a_claim_counts_when_only_the_servers_answer_was_lost(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.mkdir(parents=True)
    real = os.link

    def link(source: Path, target: Path) -> None:
        real(source, target)
        real(source, target)  # the request is sent again

    monkeypatch.setattr(claims.os, "link", link)
    assert claims.create_once(path / "claim-000001.json", b"first")


def test_a_number_that_others_took_and_left_behind_is_not_taken_again(path: Path) -> None:
    with Lease(path):
        pass
    seen = claims.newest_claim(path)  # we look, and are held up
    assert seen is not None and seen.token == 1
    with Lease(path):
        pass
    with Lease(path) as other:
        assert other.token == 3 and tell_apart(path) == ["claim-000003.json"]
        late = Lease(path)
        lock = claims.FileLock.attempt(path.parent / "any", is_shared=False)
        assert lock is not None
        assert not late._link_claim(seen, lock)
        assert not late._link_claim(None, lock)
        other.check()
        lock.release()
    assert tell_apart(path) == ["claim-000003.json"]


def test_claims_that_a_killed_owner_did_not_clear_away_are_no_obstacle(path: Path) -> None:
    with Lease(path) as first:
        old = first.path / "claim-000001.json"
        content = old.read_bytes()
    with Lease(path):
        pass
    old.write_bytes(content)
    with Lease(path) as third:
        assert third.token == 3 and tell_apart(path) == ["claim-000003.json"]


def test_a_lock_on_a_file_that_was_deleted_meanwhile_is_none(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.mkdir(parents=True)
    real, successors = claims.fcntl.flock, []

    def flock(descriptor: int, kind: int) -> None:
        if not successors:  # between our open and our lock the owner forgets the lease and another takes a new file
            successors.append(None)
            (path / "lock").unlink()
            successors.append(claims.FileLock.attempt(path / "lock", is_shared=False))
        real(descriptor, kind)

    monkeypatch.setattr(claims.fcntl, "flock", flock)
    assert claims.FileLock.attempt(path / "lock", is_shared=False) is None
    successors[1].release()


def test_an_owner_elsewhere_is_not_replaced_while_its_heart_beats(path: Path, elsewhere: None) -> None:
    ttl_s = 3.0
    with Child(OWNER, path, ttl_s, elsewhere="a") as owner:
        owner.hear("token")
        lease = Lease(path, ttl_s=ttl_s)
        with pytest.raises(LeaseHeld, match=r"node-a .*heartbeat stands still for 3 s"):
            lease.acquire(timeout_s=1.2 * ttl_s)
        owner.stop()
        lease.acquire(timeout_s=60)  # it does not beat any more
        assert lease.token == 2 and lease.took_over_expired
        owner.process.send_signal(signal.SIGCONT)
        owner.tell()
        assert "taken over by" in owner.hear("lost")
        owner.finish()
        lease.check()  # what the old owner did on its way out has not touched the new one's
        lease.release()


def test_an_owner_elsewhere_that_was_silent_for_a_day_is_replaced_at_once(path: Path, elsewhere: None) -> None:
    with Child(OWNER, path, 3600, elsewhere="a") as owner:
        owner.hear("token")
        owner.kill()
    claim = claims.newest_claim(path)
    assert claim is not None
    os.utime(claim.path, (claim.heartbeat - 2 * 86_400,) * 2)
    with Lease(path, ttl_s=3600) as lease:
        assert lease.took_over_expired


def test_a_stopped_owner_on_this_machine_keeps_it_and_is_named(path: Path) -> None:
    with Child(OWNER, path, 0.3) as owner:
        owner.hear("token")
        owner.stop()
        with pytest.raises(LeaseHeld, match=f"process {owner.pid} on .*is stopped: continue or kill it"):
            Lease(path, ttl_s=0.3).acquire(timeout_s=1.0)


def test_without_locks_a_dead_process_of_this_machine_is_replaced_at_once(path: Path, elsewhere: None) -> None:
    with Child(OWNER, path, 3600, elsewhere="here") as owner:
        owner.hear("token")
        with pytest.raises(LeaseHeld, match=f"process {owner.pid}"):
            Lease(path, ttl_s=3600).acquire(wait=False)
        owner.kill()
        with Lease(path, ttl_s=3600) as lease:
            assert lease.token == 2 and not lease.took_over_expired


def test_the_loser_of_a_lease_is_told_by_its_heartbeat(path: Path) -> None:
    lost: list[str] = []
    lease = Lease(path, ttl_s=0.6, on_lost=lost.append)
    lease.acquire()
    claim = claims.newest_claim(path)
    assert claim is not None
    os.rename(claim.path, path / "claim-000002.json")
    wait_until(lambda: bool(lost))
    assert "taken over" in lost[0]
    with pytest.raises(LeaseLost):
        lease.check()
    lease.release()
    assert tell_apart(path) == ["claim-000002.json"], "a loser leaves the winner's claim alone"


def test_a_claim_of_the_same_number_is_not_mistaken_for_ours(path: Path) -> None:
    lease = Lease(path)
    lease.acquire()
    claim = claims.newest_claim(path)
    assert claim is not None
    content = claim.path.read_text().replace(claim.nonce, "0" * 16)
    claim.path.unlink()
    claim.path.write_text(content)  # forgotten by a collector and taken anew
    with pytest.raises(LeaseLost):
        lease.check()
    lease.release()


def test_a_new_owner_waits_for_the_workers_of_a_dead_one(path: Path) -> None:
    waited: list[str] = []
    with Child(OWNER_WITH_WORKER, path) as owner:
        pid = int(owner.hear("owner").split()[1])
        assert owner.hear("worker") == "worker 1"
        owner.kill()
        lease = Lease(path, grace_s=600)
        thread = threading.Thread(target=lease.acquire, kwargs={"on_wait": waited.append})
        thread.start()
        wait_until(lambda: bool(waited))
        assert f"process {pid} of an owner that is dead" in waited[0]
        with pytest.raises(LeaseHeld, match="in use"):
            Lease(path).acquire(wait=False)
        os.kill(pid, signal.SIGKILL)
        thread.join(60)
        lease.check()
        assert lease.token == 2 and not [name for name in tell_apart(path) if name.startswith("worker")]
        lease.release()


@pytest.mark.parametrize("owner_code", [OWNER_WITH_WORKER, OWNER_WITH_FORK], ids=["worker", "forked child"])
def test_what_outlives_its_owner_is_killed_after_a_grace_period(path: Path, owner_code: str) -> None:
    with Child(owner_code, path) as owner:
        pid = int(owner.hear("owner").split()[1])
        if owner_code is OWNER_WITH_WORKER:
            owner.hear("worker")
        owner.kill()
        assert processes.start_time(pid) is not None, "it lives on"
        lease = Lease(path, grace_s=0.2)
        lease.acquire(timeout_s=60)
        assert processes.start_time(pid) is None
        lease.release()


def test_a_living_owners_forked_children_are_left_alone(path: Path) -> None:
    with Child(OWNER_WITH_FORK, path) as owner:
        pid = int(owner.hear("owner").split()[1])
        with pytest.raises(LeaseHeld, match=f"process {owner.pid} on"):
            Lease(path, grace_s=0.0).acquire(timeout_s=0.5)
        assert processes.start_time(pid) is not None
        os.kill(pid, signal.SIGKILL)


def test_a_process_that_is_just_taking_a_dead_ones_lock_is_left_alone(path: Path) -> None:
    with Child(OWNER, path, 60) as owner:
        owner.hear("token")
        owner.kill()
    code = "import sys; from pathlib import Path; from mgm_exp.store import claims\n"
    code += "lock = claims.FileLock.attempt(Path(sys.argv[1]) / 'lock', is_shared=False); print('has it'); input()"
    with Child(code, path) as taker:
        taker.hear("has it")
        with pytest.raises(LeaseHeld):
            Lease(path, grace_s=0.0).acquire(timeout_s=0.5)
        assert processes.start_time(taker.pid) is not None


def test_a_forked_child_cannot_give_away_its_parents_lease(path: Path) -> None:
    lease = Lease(path)
    lease.acquire()
    child = os.fork()
    if child == 0:
        lease.release()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    lease.check()
    with pytest.raises(LeaseHeld):
        Lease(path).acquire(wait=False)
    lease.release()


def test_a_worker_that_comes_too_late_is_turned_away(path: Path) -> None:
    with pytest.raises(LeaseLost, match="no owner"):
        hold_shared(path)
    with Lease(path) as first:
        old = first.token
    with pytest.raises(LeaseLost, match="no owner"):
        hold_shared(path, old)
    with Lease(path) as second:
        with pytest.raises(LeaseLost, match=f"token {second.token}, not {old}"):
            hold_shared(path, old)
        hold = hold_shared(path, second.token)
        hold.check()
        hold.release()
    with Child(OWNER, path, 60) as owner:
        owner.hear("token")
        with pytest.raises(LeaseLost, match="did not start this process"):
            hold_shared(path)


def test_a_worker_elsewhere_is_waited_for_and_ends_itself_when_it_is_replaced(path: Path, elsewhere: None) -> None:
    worker_code = "import sys; from mgm_exp.store import hold_shared; hold_shared(sys.argv[1], 1, ttl_s=1); "
    worker_code += "print('worker'); import time; time.sleep(600)"
    with Child(OWNER, path, 1, elsewhere="a") as owner:
        owner.hear("token")
        with Child(worker_code, path, elsewhere="b") as worker:
            worker.hear("worker")
            owner.kill()
            lease = Lease(path, ttl_s=1)
            lease.acquire(timeout_s=60)
            assert lease.token == 2
            assert worker.process.wait(60) == -signal.SIGKILL
            worker.hear(f"{path} has a new owner; this worker of the old one ends")
            lease.release()


def test_forgetting_removes_the_folder_and_lets_a_waiter_in(path: Path) -> None:
    first = Lease(path)
    first.acquire()
    second = Lease(path)
    thread = threading.Thread(target=second.acquire)
    thread.start()
    first.release(forget=True)
    thread.join(60)
    second.check()
    second.release(forget=True)
    assert not path.exists()


def test_a_lease_with_workers_is_not_forgotten(path: Path) -> None:
    lease = Lease(path)
    lease.acquire()
    hold = hold_shared(path, lease.token)
    lease.release(forget=True)
    assert (path / "workers").exists()
    hold.release()


def test_a_damaged_claim_does_not_block_for_ever(path: Path) -> None:
    with Lease(path):
        pass
    claim = claims.newest_claim(path)
    assert claim is not None
    claim.path.write_bytes(b"\0" * 40)  # what a power cut may leave
    with Lease(path, ttl_s=0.3) as lease:
        assert lease.token == 2 and lease.took_over_expired


def test_a_folder_that_cannot_be_written_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    if os.geteuid() == 0:
        with pytest.raises(OSError):
            Lease(tmp_path / "file" / ".lease").acquire()
        return
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written"):
        Lease(tmp_path / ".lease").acquire()
    tmp_path.chmod(0o700)


def test_killed_at_any_change_to_the_disk_a_lease_can_be_taken_again(path: Path) -> None:
    tokens: list[int] = []

    def once(say: object) -> None:
        lease = Lease(path)
        lease.acquire()
        lease.release()

    points = 0
    for point in crash_points(lambda: None, once):
        points += 1
        lease = Lease(path)
        lease.acquire(wait=False)
        tokens.append(lease.token)
        lease.check()
        lease.release(forget=point.number % 5 == 0)
        if point.number % 5 == 0:
            assert not path.exists(), point
            tokens.clear()
        assert tokens == sorted(set(tokens)), "tokens only grow"
    assert points > 12
    met("kill: python", points - 1)


def test_the_claim_on_disk_names_its_holder(path: Path) -> None:
    with Lease(path):
        claim = claims.newest_claim(path)
        assert claim is not None
        content = read_json(claim.path)
        assert content["holder"]["pid"] == os.getpid() and content["released_at"] is None
        assert set(content["holder"]) == {"host", "boot_id", "pid_namespace", "pid", "started", "command"}
        assert abs(claim.heartbeat - time.time()) < 60
    assert read_json(claim.path)["released_at"] is not None
