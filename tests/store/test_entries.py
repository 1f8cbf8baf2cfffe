"""A stage is made once, survives any death of its maker, and what is published is whole."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mgm_exp.errors import DiskFullError, LeaseLost, UserError
from mgm_exp.store import (
    MARK,
    Lease,
    Store,
    claims,
    collection,
    entries,
    files,
    lease_of,
    link_tree,
    processes,
    read_json,
    stage_key,
    verify,
)
from mgm_exp.store.work import adopt_work
from tests.fault_table import met

from .crash_points import crash_points, names_below
from .real_processes import Child

KEY = stage_key("align", 1, {"seed": 0})
CONTENT = {"connector.safetensors": b"weights" * 1000, "sub/metrics.jsonl": b'{"step": 1}\n'}

# Makes a stage in 20 steps, each saved in the work folder; says each; the result depends on every step being done once.
MAKER = """
import os, sys
from mgm_exp.store import LeaseLost, Store, write_atomic

def make(work):
    state = work / "state"
    done = state.read_text().split() if state.exists() else []
    print("resumed", len(done), work.name)
    for step in range(len(done), 20):
        print("step", step)
        done.append(str(step * step))
        write_atomic(state, " ".join(done))
        if "--slowly" in sys.argv:
            input()
    write_atomic(work / "out" / "result", " ".join(done))
    return {"steps": len(done)}

store = Store(sys.argv[1], ttl_s=float(sys.argv[3]))
try:
    output = store.produce("align", sys.argv[2], make, inputs={"seed": 0}, on_wait=lambda why: print("waiting", why))
    print("reused" if output.reused else "made", output.seconds, output.meta["steps"])
except LeaseLost as error:
    print("lost", error)
"""
RESULT = " ".join(str(step * step) for step in range(20))


def make(work: Path) -> dict[str, int]:
    for name, content in CONTENT.items():
        (work / "out" / name).parent.mkdir(exist_ok=True)
        files.write_atomic(work / "out" / name, content)
    return {"steps": 1}


def refuse(work: Path) -> dict[str, int]:
    raise AssertionError("must not be made again")


def is_right(path: Path) -> bool:
    return verify(path) == [] and all((path / name).read_bytes() == content for name, content in CONTENT.items())


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", grace_s=0.2)


def test_a_stage_is_made_once_and_then_reused(store: Store) -> None:
    made = store.produce("align", KEY, make, inputs={"seed": 0})
    assert not made.reused and made.meta == {"steps": 1} and is_right(made.path)
    again = store.produce("align", KEY, refuse, inputs={"seed": 0})
    assert again.reused
    assert (again.path, again.seconds, again.meta, again.inputs) == (made.path, made.seconds, made.meta, {"seed": 0})
    record = read_json(made.path / "stage.json")
    assert (record["stage"], record["key"], record["attempts"]) == ("align", KEY, 1)
    assert names_below(store.root) == [
        "align",
        *(f"align/{KEY}{name}" for name in ("", f"/{MARK}", "/connector.safetensors", "/stage.json", "/sub")),
        f"align/{KEY}/sub/metrics.jsonl",
    ]


def test_two_processes_that_need_the_same_stage_make_it_once(store: Store) -> None:
    with Child(MAKER, store.root, KEY, 60, "--slowly") as first:
        first.hear("step 0")
        with Child(MAKER, store.root, KEY, 60) as second:
            assert f"waiting for process {first.pid} on" in second.hear("waiting")
            for _ in range(20):
                first.tell()
            _, seconds, _ = first.hear("made").split()
            assert second.hear("reused").split()[1:] == [seconds, "20"]
            assert "step" not in second.finish()
    entry = store.entry("align", KEY)
    assert entry is not None and (entry.path / "result").read_text() == RESULT


def test_two_threads_that_need_the_same_stage_make_it_once(store: Store) -> None:
    calls: list[Path] = []
    outputs = []

    def slow(work: Path) -> dict[str, int]:
        calls.append(work)
        time.sleep(0.1)
        return make(work)

    threads = [
        threading.Thread(target=lambda: outputs.append(store.produce("align", KEY, slow, inputs={}))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(calls) == 1 and sorted(output.reused for output in outputs) == [False, True, True]


def test_killed_again_and_again_the_next_attempt_goes_on_in_the_same_folder(store: Store) -> None:
    saved = 0
    for step in (0, 1, 5, 6, 19):
        with Child(MAKER, store.root, KEY, 3600, "--slowly") as maker:
            resumed = int(maker.hear("resumed").split()[1])
            assert resumed in (saved, saved + 1), "all that was saved before the kill is there"
            for number in range(resumed, step + 1):
                maker.hear(f"step {number}")
                if number < step:
                    maker.tell()
            maker.kill()  # just before, in, or just after the saving of this step
            saved = max(resumed, step)
        assert store.entry("align", KEY) is None
    with Child(MAKER, store.root, KEY, 3600) as last:
        assert last.hear("resumed").split()[2] == f"{KEY}.work"
        last.hear("made")
    entry = store.entry("align", KEY, verify=True)
    assert entry is not None and (entry.path / "result").read_text() == RESULT
    assert read_json(entry.path / "stage.json")["attempts"] == 6
    assert not (store.root / "align" / f"{KEY}.work").exists()


def test_time_spent_counts_all_attempts_also_those_that_were_killed(store: Store) -> None:
    work = store.root / "align" / f"{KEY}.work"
    work.mkdir(parents=True)
    files.write_json_atomic(work / "attempts.json", {"seconds": 100.0, "attempts": 3})
    output = store.produce("align", KEY, make, inputs={})
    assert 100.0 < output.seconds < 150.0
    assert read_json(output.path / "stage.json")["attempts"] == 4


def test_a_failure_leaves_the_work_for_the_next_attempt(store: Store) -> None:
    def fail(work: Path) -> dict[str, int]:
        (work / "checkpoint").write_text("half")
        (work / "out" / "junk.json").write_text("junk")
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        store.produce("align", KEY, fail, inputs={})
    assert store.entry("align", KEY) is None
    assert Lease(store.root / "align" / f"{KEY}.lease").holder() is None

    def go_on(work: Path) -> dict[str, int]:
        assert (work / "checkpoint").read_text() == "half"
        (work / "out" / "junk.json").unlink()
        return make(work)

    assert is_right(store.produce("align", KEY, go_on, inputs={}).path)


def test_an_owner_that_was_replaced_cannot_publish_nor_spoil_the_new_ones_work(store: Store) -> None:
    ttl_s = 3.0
    with (
        Child(MAKER, store.root, KEY, ttl_s, "--slowly", elsewhere="a") as old,
        Child("input()" + MAKER, store.root, KEY, ttl_s, "--slowly", elsewhere="b") as new,
    ):
        old.hear("step 0")
        new.tell()
        assert "node-a" in new.hear("waiting")
        old.tell()
        old.hear("step 1")
        old.stop()
        resumed = new.hear("resumed").split()
        assert resumed[1] in ("1", "2") and resumed[2] == f"{KEY}.work-000002", "a name that the old one does not know"
        new.hear(f"step {resumed[1]}")
        old.process.send_signal(signal.SIGCONT)
        for _ in range(30):
            old.tell()  # it goes on: its paths lead nowhere
        said = old.said.decode() + old.process.communicate(timeout=60)[0].decode()
        assert "FileNotFoundError" in said or "lost" in said
        assert "made" not in said
        for _ in range(30):
            new.tell()
        new.hear("made")
    entry = store.entry("align", KEY, verify=True)
    assert entry is not None and (entry.path / "result").read_text() == RESULT


def test_a_new_owner_gets_files_that_the_old_one_has_no_longer_open(store: Store) -> None:
    work = store.root / "align" / f"{KEY}.work"
    with Child(MAKER, store.root, KEY, 3600, "--slowly", elsewhere="a") as maker:
        maker.hear("step 0")
        maker.kill()
    claim = claims.newest_claim(lease_of(work))
    assert claim is not None
    os.utime(claim.path, (claim.heartbeat - 2 * 86_400,) * 2)  # not heard of for two days
    (work / "checkpoints").mkdir()
    (work / "checkpoints" / "log").write_text("one\n")
    (work / "latest").symlink_to("checkpoints/log")
    with open(work / "checkpoints" / "log", "a") as open_elsewhere, store.lease("align", KEY) as lease:
        adopted = adopt_work(store.root / "align" / KEY, lease)
        open_elsewhere.write("two\n")
    assert adopted.name == f"{KEY}.work-000002" and not work.exists()
    assert (adopted / "checkpoints" / "log").read_text() == "one\n"
    assert lease_of(adopted) == lease_of(work)
    assert store.produce("align", KEY, lambda folder: {"same": folder == adopted}, inputs={}).meta == {"same": True}
    assert not adopted.exists()


def test_what_was_sealed_when_its_maker_died_is_published_without_making_it_again(store: Store) -> None:
    def prepare() -> None:
        shutil.rmtree(store.root, ignore_errors=True)

    outcomes = set()
    for point in crash_points(prepare, lambda say: store.produce("align", KEY, make, inputs={})):
        sealed = (store.root / "align" / f"{KEY}.work" / "out" / MARK).exists()
        published = (store.root / "align" / KEY).exists()
        if sealed or published:
            output = store.produce("align", KEY, refuse, inputs={})
            assert is_right(output.path), point
            outcomes.add((output.reused, published))
    assert outcomes == {(False, False), (True, True)}
    met("kill: python", point.number - 1)


def test_killed_at_any_change_to_the_disk_an_entry_is_whole_or_absent(store: Store) -> None:
    points = 0
    for point in crash_points(
        lambda: shutil.rmtree(store.root, ignore_errors=True),
        lambda say: (store.produce("align", KEY, make, inputs={}), say("published")),
        half_writes=True,
    ):
        points += 1
        entry = store.entry("align", KEY, verify=True)
        assert entry is None or is_right(entry.path), point
        assert entry is not None or "published" not in point.said, point
        if (store.root / "align" / KEY).exists():
            assert entry is not None, point
        assert is_right(store.produce("align", KEY, make, inputs={}).path), point
        store.gc(older_than_s=3600)
        assert sorted(path.name for path in (store.root / "align").iterdir()) == [KEY], point
    assert points > 40
    met("kill: python", points - 1)


def test_killed_at_any_change_to_the_disk_a_collection_leaves_whole_entries_or_none(store: Store) -> None:
    def prepare() -> None:
        shutil.rmtree(store.root, ignore_errors=True)
        for seed in (0, 1):
            store.produce("align", f"key-{seed}", make, inputs={})

    points = 0
    for point in crash_points(prepare, lambda say: store.gc(["key-1"], older_than_s=0.0)):
        points += 1
        for seed in (0, 1):
            entry = store.entry("align", f"key-{seed}", verify=True)
            assert entry is not None or not (store.root / "align" / f"key-{seed}").exists(), point
            assert entry is None or is_right(entry.path), point
            assert seed == 0 or entry is not None, point
        store.gc(["key-1"], older_than_s=0.0)
        assert sorted(path.name for path in (store.root / "align").iterdir()) == ["key-1"], point
    assert points > 15
    met("kill: python", points - 1)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda path: (path / "connector.safetensors").write_bytes(b"Weights" * 1000),
    "a truncated file": lambda path: os.truncate(path / "connector.safetensors", 5),
    "an appended line": lambda path: (path / "sub" / "metrics.jsonl").write_bytes(
        CONTENT["sub/metrics.jsonl"] + b"{}\n"
    ),
    "a missing file": lambda path: (path / "sub" / "metrics.jsonl").unlink(),
    "an extra file": lambda path: (path / "extra").touch(),
    "no mark": lambda path: (path / MARK).unlink(),
    "a torn mark": lambda path: os.truncate(path / MARK, 40),
    "no record": lambda path: (path / "stage.json").unlink(),
    "nothing": lambda path: [shutil.rmtree(path), path.mkdir()],
}


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_a_damaged_entry_is_reported_moved_aside_and_made_again(
    store: Store, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = store.produce("align", KEY, make, inputs={}).path
    for file in path.rglob("*"):
        file.chmod(0o755)
    DAMAGES[damage](path)
    with caplog.at_level(logging.WARNING):
        assert store.entry("align", KEY) is None
        assert "is damaged" in caplog.text
        output = store.produce("align", KEY, make, inputs={})
    assert not output.reused and is_right(output.path)
    assert (store.root / "align" / f"{KEY}.damaged-1").is_dir()
    assert "moved to" in caplog.text and "made again" in caplog.text


def test_rot_without_a_write_is_found_when_asked_for(store: Store) -> None:
    path = store.produce("align", KEY, make, inputs={}).path / "connector.safetensors"
    facts = path.stat()
    path.chmod(0o600)
    path.write_bytes(b"Weights" * 1000)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert store.entry("align", KEY) is not None
    assert store.entry("align", KEY, verify=True) is None
    assert not store.produce("align", KEY, make, inputs={}, verify=True).reused


def test_an_entry_of_another_key_is_not_taken_for_this_one(store: Store) -> None:
    path = store.produce("align", KEY, make, inputs={}).path
    shutil.copytree(path, path.with_name("another"))
    assert store.entry("align", "another") is None
    assert store.entry("align", KEY) is not None


def test_a_copied_store_is_as_good_as_the_original(store: Store, tmp_path: Path) -> None:
    store.produce("align", KEY, make, inputs={})
    shutil.copytree(store.root, tmp_path / "copy", copy_function=shutil.copyfile)  # times and modes are lost
    copy = Store(tmp_path / "copy")
    assert copy.produce("align", KEY, refuse, inputs={}).reused


def test_published_files_are_read_only_for_runs_share_them_by_links(store: Store, tmp_path: Path) -> None:
    path = store.produce("align", KEY, make, inputs={}).path
    link_tree(path, tmp_path / "run")
    assert os.path.samefile(path / "connector.safetensors", tmp_path / "run" / "connector.safetensors")
    for file in (path / "connector.safetensors", path / "stage.json", path / MARK):
        assert file.stat().st_mode & 0o222 == 0
    with open(tmp_path / "run" / "connector.safetensors", "ab" if os.geteuid() == 0 else "rb") as file:
        if os.geteuid() == 0:
            file.write(b"!")  # root may all the same
    assert (store.entry("align", KEY) is None) == (os.geteuid() == 0)


BAD_NAMES = ["", ".", "..", "../x", "a/b", "/etc", ".hidden", "a b", "a\n", "ä", "n" * 201]
OWN_NAMES = ["x.work", "x.lease", "x.work-3", "x.damaged-1", "x.trash-0"]


@pytest.mark.parametrize("name", BAD_NAMES + OWN_NAMES)
def test_names_that_lead_elsewhere_are_refused(store: Store, name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a stage or a key"):
        store.produce("align", name, refuse, inputs={})
    with pytest.raises(ValueError, match="cannot name a stage or a key"):
        store.entry(name, KEY)


def test_a_link_out_of_the_store_is_refused(store: Store, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    store.root.mkdir()
    (store.root / "align").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="leads out of the store"):
        store.produce("align", KEY, refuse, inputs={})
    assert store.gc(older_than_s=0.0) == []
    linked = Store(tmp_path / "link")
    (tmp_path / "link").symlink_to(tmp_path / "outside")
    assert is_right(linked.produce("align", KEY, make, inputs={}).path), "the root itself may be a link"


@pytest.mark.parametrize("inputs", [{"path": Path("/data")}, {"lr": float("nan")}])
def test_what_cannot_be_recorded_fails_before_the_work_not_after(store: Store, inputs: dict[str, object]) -> None:
    with pytest.raises((TypeError, ValueError)):
        store.produce("align", KEY, refuse, inputs=inputs)


@pytest.mark.parametrize("name", ["stage.json", MARK])
def test_the_stores_own_names_are_not_overwritten(store: Store, name: str) -> None:
    with pytest.raises(ValueError, match="use another name"):
        store.produce("align", KEY, lambda work: (work / "out" / name).touch(), inputs={})  # type: ignore[func-returns-value]
    assert store.entry("align", KEY) is None


def test_a_full_disk_publishes_nothing_and_keeps_the_work(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, is_full = os.write, False

    def write(descriptor: int, data: bytes) -> int:
        if is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    def fill(work: Path) -> dict[str, int]:
        nonlocal is_full
        (work / "checkpoint").write_text("done")
        meta = make(work)
        is_full = True
        return meta

    monkeypatch.setattr(files.os, "write", write)
    with pytest.raises(DiskFullError, match=r"stage\.json"):
        store.produce("align", KEY, fill, inputs={})
    is_full = False
    assert store.entry("align", KEY) is None
    assert (store.root / "align" / f"{KEY}.work" / "checkpoint").read_text() == "done"
    assert is_right(store.produce("align", KEY, make, inputs={}).path)


def test_a_lease_lost_during_the_work_publishes_nothing(store: Store) -> None:
    lease = store.root / "align" / f"{KEY}.lease"

    def lose(work: Path) -> dict[str, int]:
        claim = claims.newest_claim(lease)
        assert claim is not None
        os.rename(claim.path, lease / "claim-000002.json")
        return make(work)

    with pytest.raises(LeaseLost, match="taken over"):
        store.produce("align", KEY, lose, inputs={})
    assert store.entry("align", KEY) is None


def age(path: Path, seconds: float) -> None:
    for below in [path, *path.rglob("*")]:
        os.utime(below, (time.time() - seconds,) * 2)


def test_gc_drops_what_was_not_used_and_keeps_the_rest(store: Store, tmp_path: Path) -> None:
    for key in ("old", "used", "kept", "new", "broken"):
        store.produce("align", key, make, inputs={})
    with pytest.raises(AssertionError):
        store.produce("align", "unfinished", refuse, inputs={})
    (store.root / "align" / "broken" / MARK).unlink()
    store.produce("align", "broken", make, inputs={})
    link_tree(store.root / "align" / "old", tmp_path / "run")
    for name in ("old", "used", "kept", "unfinished.work", "broken.damaged-1"):
        age(store.root / "align" / name, 1000)
    store.produce("align", "used", refuse, inputs={})
    before = names_below(store.root)
    planned = store.gc(["align/kept"], older_than_s=500, dry_run=True)
    assert names_below(store.root) == before
    dropped = store.gc(["align/kept"], older_than_s=500)
    assert {(item.path.name, item.kind) for item in dropped} == {(item.path.name, item.kind) for item in planned}
    assert sorted((item.path.name, item.kind) for item in dropped) == [
        ("broken.damaged-1", "damaged"),
        ("old", "entry"),
        ("unfinished.work", "work"),
    ]
    assert {item.path.name: item.size > 0 for item in dropped}["old"] is False, "the run folder still holds its bytes"
    assert sorted(path.name for path in (store.root / "align").iterdir()) == ["broken", "kept", "new", "used"]
    assert is_right(tmp_path / "run")
    assert sorted(entry.key for entry in store.entries()) == ["broken", "kept", "new", "used"]


def test_gc_puts_back_what_was_used_in_the_last_instant(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    entry_path = store.produce("align", KEY, make, inputs={}).path
    age(entry_path, 1000)
    real = os.rename

    def rename(old: Path, new: Path) -> None:
        if old == entry_path:
            assert store.produce("align", KEY, refuse, inputs={}).reused
        real(old, new)

    monkeypatch.setattr(collection.os, "rename", rename)
    assert store.gc(older_than_s=500) == []
    assert is_right(entry_path)


def test_an_entry_that_is_collected_between_look_up_and_use_is_made_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry_path = store.produce("align", KEY, make, inputs={}).path
    real = os.utime

    def utime(path: Path, *args: object) -> None:
        if path == entry_path and path.exists():
            shutil.rmtree(path)
        real(path, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(entries.os, "utime", utime)
    output = store.produce("align", KEY, make, inputs={})
    assert not output.reused and is_right(output.path)


def test_gc_never_touches_what_somebody_makes(store: Store) -> None:
    with Child(MAKER, store.root, KEY, 60, "--slowly") as maker:
        maker.hear("step 0")
        age(store.root / "align" / f"{KEY}.work", 10_000)
        assert store.gc(older_than_s=0.0, dry_run=True) == []
        assert store.gc(older_than_s=0.0) == []
        for _ in range(20):
            maker.tell()
        maker.hear("made")


def test_workers_of_a_killed_maker_are_gone_before_the_next_attempt_begins(store: Store) -> None:
    code = """
import subprocess, sys
from mgm_exp.store import Store, lease_of
worker = "import sys; from mgm_exp.store import hold_shared; hold_shared(sys.argv[1]); "
worker += "print('worker', flush=True); import time; time.sleep(600)"
def make(work):
    child = subprocess.Popen([sys.executable, "-S", "-c", worker, str(lease_of(work))])
    print("started", child.pid)
    child.wait()
Store(sys.argv[1]).produce("align", sys.argv[2], make, inputs={})
"""
    with Child(code, store.root, KEY) as maker:
        pid = int(maker.hear("started").split()[1])
        maker.hear("worker")
        maker.kill()

    def check(work: Path) -> dict[str, int]:
        assert processes.start_time(pid) is None, "an earlier writer is still there"
        return make(work)

    assert is_right(store.produce("align", KEY, check, inputs={}).path)


def test_only_work_folders_have_a_lease_to_join(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a work folder"):
        lease_of(tmp_path / KEY)
