"""Every way a sealed folder can be damaged is found and named, and the newest whole one is used."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mgm_exp.errors import DiskFullError
from mgm_exp.store import MARK, newest_whole, prune, publish_folder, read_json, seal, sealed, verify, write_atomic
from tests.fault_table import met

from .crash_points import Point, crash_points, names_below

FILES = {"model.safetensors": bytes(range(256)) * 40, "state.json": b'{"step": 7}', "rng/rank0.json": b"[1, 2, 3]"}


def write_files(folder: Path, version: int = 0) -> Path:
    (folder / "rng").mkdir(parents=True, exist_ok=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content + str(version).encode())
    return folder


def sealed_folder(folder: Path, version: int = 0) -> Path:
    seal(write_files(folder, version))
    return folder


def version_of(folder: Path) -> int:
    content = (folder / "model.safetensors").read_bytes()
    return int(content[len(FILES["model.safetensors"]) :])


def test_a_sealed_folder_is_whole_and_its_mark_says_what_is_in_it(tmp_path: Path) -> None:
    folder = sealed_folder(tmp_path / "step-000007")
    assert verify(folder) == verify(folder, full=False) == []
    mark = read_json(folder / MARK)
    assert mark["schema_version"] == 1
    assert sorted(mark["files"]) == ["model.safetensors", "rng/rank0.json", "state.json"]
    assert mark["files"]["state.json"]["size"] == 12


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << (bit % 8)
    path.write_bytes(content)


def swap(path: Path) -> None:
    other = path.with_name("other")
    shutil.copy(path, other)
    flip(other, 3)
    os.replace(other, path)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated to 0": (lambda path: os.truncate(path, 0), "bytes instead of"),
    "truncated to 8": (lambda path: os.truncate(path, 8), "bytes instead of"),
    "truncated by 1": (lambda path: os.truncate(path, path.stat().st_size - 1), "bytes instead of"),
    "one byte more": (lambda path: path.write_bytes(path.read_bytes() + b"\n"), "bytes instead of"),
    "one bit flipped": (lambda path: flip(path, 77), "SHA-256"),
    "all zero": (lambda path: path.write_bytes(bytes(path.stat().st_size)), "SHA-256"),
    "deleted": (lambda path: path.unlink(), "missing"),
    "of another step": (swap, "SHA-256"),
    "a folder": (lambda path: (path.unlink(), path.mkdir(), (path / "x").touch()), "missing"),
    "a link out": (lambda path: (path.unlink(), path.symlink_to("/etc/hostname")), "symbolic link"),
}


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    folder = sealed_folder(tmp_path / "step-1")
    change, expected = DAMAGES[damage]
    change(folder / name)
    for full in (True, False):
        faults = verify(folder, full=full)
        assert faults and any(name in fault and expected in fault for fault in faults), faults
    met("damage", 1)


@pytest.mark.parametrize("damage", sorted(set(DAMAGES) - {"deleted"}))
def test_a_damaged_mark_is_named(tmp_path: Path, damage: str) -> None:
    folder = sealed_folder(tmp_path / "step-1")
    DAMAGES[damage][0](folder / MARK)
    faults = verify(folder)
    assert faults and faults[0].startswith(MARK), faults
    met("damage", 1)


def test_a_missing_mark_means_never_completed(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "step-1")
    assert verify(folder) == [f"{MARK}: missing, so the folder was never completed"]
    assert verify(tmp_path / "nowhere") != []


def test_an_extra_file_is_named(tmp_path: Path) -> None:
    folder = sealed_folder(tmp_path / "step-1")
    (folder / "rng" / "rank1.json").write_text("[]")
    assert verify(folder) == ["rng/rank1.json: not in the manifest"]


@given(bit=st.integers(min_value=0, max_value=20_000), name=st.sampled_from([*sorted(FILES), MARK]))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_single_flipped_bit_is_found(tmp_path: Path, bit: int, name: str) -> None:
    folder = tmp_path / "step-1"
    if not folder.exists():
        sealed_folder(folder)
    before = (folder / name).read_bytes()
    flip(folder / name, bit)
    faults = verify(folder)
    (folder / name).write_bytes(before)
    assert faults and faults[0].startswith(name), faults
    assert verify(folder) == []
    met("damage", 1)


def test_a_hostile_mark_leads_nowhere(tmp_path: Path) -> None:
    folder = sealed_folder(tmp_path / "step-1")
    files = read_json(folder / MARK)["files"]
    for name in ("../secret", "/etc/passwd", "a/../../b"):
        files[name] = files["state.json"]
        (folder / MARK).write_bytes(sealed._encode(files))
        assert "outside the folder" in verify(folder)[0]
        del files[name]
    for content in ([], {"schema_version": 2}, {"schema_version": 1, "files": []}, {"schema_version": 1}):
        (folder / MARK).write_text(json.dumps(content))
        assert verify(folder)[0].startswith(MARK)


def test_the_cheap_look_reads_only_files_whose_time_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sealed_folder(tmp_path / "step-1")
    read: list[str] = []
    real = sealed.file_sha256
    monkeypatch.setattr(sealed, "file_sha256", lambda path: read.append(path.name) or real(path))
    assert verify(folder, full=False) == [] and read == []
    os.utime(folder / "state.json", (1, 1))
    assert verify(folder, full=False) == [] and read == ["state.json"]
    assert verify(folder, full=False) == [] and read == ["state.json"], "the right bytes got their time back"
    rotten = folder / "model.safetensors"
    before = rotten.stat()
    flip(rotten, 5)
    os.utime(rotten, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert verify(folder, full=False) == [], "rot that leaves size and time alone is what only the full look finds"
    assert verify(folder) == ["model.safetensors: its SHA-256 is not the one in the manifest"]


def test_sealing_removes_the_temporary_files_of_a_killed_write_and_refuses_links(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "step-1")
    (folder / ".tmp-0123456789abcdef").write_text("half")
    seal(folder)
    assert verify(folder) == []
    (folder / "link").symlink_to("state.json")
    with pytest.raises(ValueError, match="symbolic link"):
        seal(folder)


def test_the_newest_whole_one_is_used_and_the_others_are_named(tmp_path: Path) -> None:
    for step in (9, 50, 100, 1000):
        sealed_folder(tmp_path / f"step-{step}", step)
    assert newest_whole(tmp_path) == (tmp_path / "step-1000", [])
    flip(tmp_path / "step-1000" / "model.safetensors", 4)
    (tmp_path / "step-100" / MARK).unlink()
    write_files(tmp_path / "step-2000.tmp")  # a save that was killed: not a fault
    write_files(tmp_path / "other-3000")
    found, passed_over = newest_whole(tmp_path)
    assert found == tmp_path / "step-50"
    assert passed_over == [
        "step-1000: model.safetensors: its SHA-256 is not the one in the manifest",
        f"step-100: {MARK}: missing, so the folder was never completed",
    ]
    for name in ("step-9", "step-50"):
        os.truncate(tmp_path / name / "state.json", 0)
    found, passed_over = newest_whole(tmp_path)
    assert found is None and len(passed_over) == 4
    assert newest_whole(tmp_path / "nowhere") == (None, [])


def test_pruning_keeps_the_newest_whole_ones_and_never_trusts_a_damaged_one(tmp_path: Path) -> None:
    for step in range(1, 7):
        sealed_folder(tmp_path / f"step-{step}", step)
    os.truncate(tmp_path / "step-6" / "state.json", 0)
    (tmp_path / "step-4" / MARK).unlink()
    removed = prune(tmp_path, 2, protect=["step-1"])
    assert [path.name for path in removed] == ["step-2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-3", "step-4", "step-5", "step-6"]
    assert newest_whole(tmp_path)[0] == tmp_path / "step-5"
    with pytest.raises(ValueError, match="keep=0"):
        prune(tmp_path, 0)


def test_publishing_over_an_existing_folder_replaces_it_or_refuses(tmp_path: Path) -> None:
    sealed_folder(tmp_path / "step-1", 1)
    write_files(tmp_path / "step-1.tmp", 2)
    with pytest.raises(FileExistsError):
        publish_folder(tmp_path / "step-1.tmp", tmp_path / "step-1", replace=False)
    assert version_of(tmp_path / "step-1") == 1
    publish_folder(tmp_path / "step-1.tmp", tmp_path / "step-1")
    assert version_of(tmp_path / "step-1") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_a_check_before_the_rename_stops_the_publication(tmp_path: Path) -> None:
    write_files(tmp_path / "step-1.tmp")

    def refuse() -> None:
        assert verify(tmp_path / "step-1.tmp") == [], "hashing is over when it is asked"
        raise PermissionError("not ours any more")

    with pytest.raises(PermissionError):
        publish_folder(tmp_path / "step-1.tmp", tmp_path / "step-1", before_rename=refuse)
    assert not (tmp_path / "step-1").exists()


def save_versions(parent: Path, versions: range, say: Callable[[str], None]) -> None:
    """What a training does: save, publish, promise, prune."""
    for version in versions:
        unfinished = parent / f"step-{version:06d}.tmp"
        sealed.remove_folder(unfinished)
        (unfinished / "rng").mkdir(parents=True)
        for name, content in FILES.items():
            write_atomic(unfinished / name, content + str(version).encode())
        publish_folder(unfinished, parent / f"step-{version:06d}")
        say(f"committed {version}")
        prune(parent, 2)


def fresh(parent: Path, start: Path) -> Callable[[], None]:
    """Makes ``parent`` a copy of ``start``."""

    def prepare() -> None:
        shutil.rmtree(parent, ignore_errors=True)
        shutil.copytree(start, parent)

    return prepare


def last_promise(point: Point, before: int) -> int:
    return max([before, *(int(line.split()[1]) for line in point.said)])


def test_killed_at_any_change_to_the_disk_no_committed_checkpoint_is_lost(tmp_path: Path) -> None:
    start, parent = tmp_path / "start", tmp_path / "checkpoints"
    for version in (1, 2, 3):
        sealed_folder(start / f"step-{version:06d}", version)
    points = 0
    for point in crash_points(
        fresh(parent, start), lambda say: save_versions(parent, range(4, 7), say), half_writes=True
    ):
        points += 1
        found, _ = newest_whole(parent)
        assert found is not None, point
        assert version_of(found) >= last_promise(point, 3), point
        assert found.name == f"step-{version_of(found):06d}", point
        for name, content in FILES.items():
            assert (found / name).read_bytes() == content + str(version_of(found)).encode(), point
        for folder in parent.iterdir():
            assert not (folder / MARK).exists() or verify(folder) == [], "half a folder has no mark"
        if point.number % 7 == 0:  # and the one who comes next finds nothing in the way
            save_versions(parent, range(version_of(found) + 1, 9), lambda text: None)
            assert names_below(parent)[0] == "step-000007" and verify(parent / "step-000008") == []
            assert len(list(parent.iterdir())) == 2
    assert points > 100, points
    met("kill: python", points - 1)


def test_killed_while_a_step_is_saved_again_the_old_one_or_the_new_is_there(tmp_path: Path) -> None:
    start, parent = tmp_path / "start", tmp_path / "checkpoints"
    sealed_folder(start / "step-000005", 1)
    write_files(start / "step-000005.tmp", 2)
    versions = set()
    for point in crash_points(
        fresh(parent, start),
        lambda say: (publish_folder(parent / "step-000005.tmp", parent / "step-000005"), say("committed 2")),
    ):
        found, _ = newest_whole(parent)
        assert found is not None, point
        assert version_of(found) >= last_promise(point, 1), point
        versions.add(version_of(found))
        write_files(parent / "step-000005.tmp", 3)
        publish_folder(parent / "step-000005.tmp", parent / "step-000005")
        assert version_of(parent / "step-000005") == 3 and len(list(parent.iterdir())) == 1, point
    assert versions == {1, 2}
    met("kill: python", point.number - 1)


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_disk_that_fills_up_at_any_write_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    sealed_folder(tmp_path / "step-000003", 3)
    real = getattr(os, call)
    number = 0
    while True:
        number += 1
        left = number

        def full(*args: object) -> object:
            nonlocal left
            left -= 1
            if left <= 0:  # and stays full
                raise OSError(28, "No space left on device")
            return real(*args)

        monkeypatch.setattr(os, call, full)
        try:
            save_versions(tmp_path, range(4, 5), lambda text: None)
        except (DiskFullError, OSError) as error:
            assert isinstance(error, DiskFullError) or number > 3, error
            monkeypatch.undo()
            assert newest_whole(tmp_path)[0] in (tmp_path / "step-000003", tmp_path / "step-000004")
            assert not [name for name in names_below(tmp_path) if ".tmp-" in name]
            shutil.rmtree(tmp_path / "step-000004", ignore_errors=True)
        else:
            monkeypatch.undo()
            break
    assert number > 4
    assert newest_whole(tmp_path)[0] == tmp_path / "step-000004"
    met("full", number - 1)


def test_everything_is_on_the_disk_before_the_name_that_promises_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut may drop what was not fsynced: each file before the mark, the mark before the rename, the rename."""
    write_files(tmp_path / "step-1.tmp")
    log: list[tuple[str, str]] = []
    real_fsync, real_rename, real_replace = os.fsync, os.rename, os.replace

    def fsync(descriptor: int) -> None:
        real_fsync(descriptor)
        log.append(("fsync", os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path)))

    def rename(old: Path, new: Path, real: Callable[[Path, Path], None] = real_rename) -> None:
        real(old, new)
        log.append(("rename", os.path.relpath(new, tmp_path)))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "replace", lambda old, new: rename(old, new, real_replace))
    publish_folder(tmp_path / "step-1.tmp", tmp_path / "step-1")
    monkeypatch.undo()
    mark = log.index(("rename", f"step-1.tmp/{MARK}"))
    published = log.index(("rename", "step-1"))
    for name in FILES:
        assert log.index(("fsync", f"step-1.tmp/{name}")) < mark
    assert log.index(("fsync", "step-1.tmp/rng")) < mark
    assert any(what == "fsync" and ".tmp-" in name for what, name in log[:mark]), "the mark's bytes before its name"
    assert ("fsync", "step-1.tmp") in log[mark:published]
    assert ("fsync", ".") in log[published:]
