"""Files are written whole or not at all, and a full disk is named."""

from __future__ import annotations

import errno
import json
import os
import sqlite3
from pathlib import Path

import pytest

from mgm_exp.errors import DiskFullError
from mgm_exp.store import (
    disk_full_named,
    files,
    hard_link_or_copy,
    link_tree,
    read_json,
    write_atomic,
    write_json_atomic,
)
from tests.fault_table import met

from .crash_points import crash_points, names_below


def test_text_bytes_and_json_are_written_as_given(tmp_path: Path) -> None:
    write_atomic(tmp_path / "t", "Größe\n")
    write_atomic(tmp_path / "b", b"\x00\xff")
    write_json_atomic(tmp_path / "j", {"a": [1, None], "标": "题"})
    assert (tmp_path / "t").read_bytes() == "Größe\n".encode()
    assert (tmp_path / "b").read_bytes() == b"\x00\xff"
    assert read_json(tmp_path / "j") == {"a": [1, None], "标": "题"}
    assert "标" in (tmp_path / "j").read_text(encoding="utf-8")
    assert names_below(tmp_path) == ["b", "j", "t"]


def test_a_name_of_255_bytes_can_be_written(tmp_path: Path) -> None:
    write_atomic(tmp_path / ("n" * 255), "x")
    assert names_below(tmp_path) == ["n" * 255]


@pytest.mark.parametrize("half_writes", [False, True])
def test_killed_anywhere_a_write_leaves_the_old_content_or_the_new(tmp_path: Path, half_writes: bool) -> None:
    path = tmp_path / "f"
    points = 0
    for point in crash_points(
        lambda: path.write_text("old"),
        lambda say: (write_atomic(path, "new" * 1000), say("committed")),
        half_writes=half_writes,
    ):
        points += 1
        content = path.read_text()
        assert content in ("old", "new" * 1000), point
        assert content != "old" or "committed" not in point.said, point
        assert path.name == "f"
    assert points >= 5
    met("kill: python", points - 1)
    write_atomic(path, "last")
    assert path.read_text() == "last"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["write", "fsync", "open", "replace"])
def test_a_full_disk_is_one_error_that_names_the_path_and_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    path = tmp_path / "result.json"
    path.write_text("old")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, call, full)
    with pytest.raises(DiskFullError, match=r"result\.json \(300 bytes\).*bytes are free"):
        write_atomic(path, "new" * 100)
    monkeypatch.undo()
    assert names_below(tmp_path) == ["result.json"]
    assert path.read_text() == "old"
    met("full", 1)


def test_another_failure_to_write_keeps_its_own_name_and_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    path.write_text("old")

    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files.os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        write_atomic(path, "new")
    monkeypatch.undo()
    assert names_below(tmp_path) == ["f"]
    assert path.read_text() == "old"


def test_a_file_system_that_cannot_fsync_a_folder_is_good_enough_one_that_fails_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, code = os.fsync, errno.EINVAL

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync)
    write_atomic(tmp_path / "f", "1")
    code = errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        write_atomic(tmp_path / "f", "2")


def test_every_way_of_saying_full_becomes_one_error(tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    with (
        pytest.raises(DiskFullError, match="shard"),
        disk_full_named(tmp_path / "shard"),
        open("/dev/full", "wb") as file,
    ):
        file.write(b"x" * 100_000)
    said = [
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 1280 vs 1170"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        sqlite3.OperationalError("database or disk is full"),
    ]
    for error in said:
        with pytest.raises(DiskFullError, match="shard"), disk_full_named(tmp_path / "shard"):
            raise error
    with pytest.raises(RuntimeError, match="shape"), disk_full_named(tmp_path / "shard"):
        raise RuntimeError("shape mismatch")


def test_a_real_full_file_system_keeps_the_old_file(small_disk: Path) -> None:
    path = small_disk / "state.json"
    write_atomic(path, "old")
    with pytest.raises(DiskFullError, match=r"state\.json"):
        write_atomic(path, b"x" * 4_000_000)
    assert path.read_text() == "old"
    assert names_below(small_disk) == ["state.json"]
    met("full", 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_that_is_none_is_refused_with_its_place_and_the_file_stays(tmp_path: Path, value: float) -> None:
    write_json_atomic(tmp_path / "r.json", {"a": 1})
    with pytest.raises(ValueError, match=r"r\.json\.metrics\.loss\[1\]"):
        write_json_atomic(tmp_path / "r.json", {"metrics": {"loss": [0.5, value]}})
    assert read_json(tmp_path / "r.json") == {"a": 1}


def test_a_lone_surrogate_survives_a_round_trip(tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "r.json", {"text": "a\ud800b"})
    assert json.loads((tmp_path / "r.json").read_bytes()) == {"text": "a\ud800b"}


@pytest.mark.parametrize("raw", [b"", b"{", b"NaN", b"[Infinity]", b"\xff", b"[" * 100_000], ids=lambda raw: raw[:9])
def test_what_is_not_strict_json_is_a_value_error(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "x.json").write_bytes(raw)
    with pytest.raises(ValueError):
        read_json(tmp_path / "x.json")


def test_a_link_shares_bytes_and_replaces_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("other")
    assert hard_link_or_copy(tmp_path / "a", tmp_path / "b") == "link"
    assert os.path.samefile(tmp_path / "a", tmp_path / "b")
    assert hard_link_or_copy(tmp_path / "a", tmp_path / "b") == "link"  # again: rename() alone would leave a third name
    assert names_below(tmp_path) == ["a", "b"]


def test_a_symbolic_link_is_resolved_never_reproduced(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    (tmp_path / "s").symlink_to("a")
    hard_link_or_copy(tmp_path / "s", tmp_path / "b")
    assert not (tmp_path / "b").is_symlink()
    assert (tmp_path / "b").read_text() == "1"
    hard_link_or_copy(tmp_path / "a", tmp_path / "s")  # over a symbolic link: replaces the link
    assert not (tmp_path / "s").is_symlink()


def test_across_devices_a_copy_is_made(tmp_path: Path, other_device: Path) -> None:
    source = other_device / "a"
    source.write_text("1")
    assert hard_link_or_copy(source, tmp_path / "b") == "copy"
    source.write_text("2")
    assert (tmp_path / "b").read_text() == "1"
    (other_device / "tree" / "sub").mkdir(parents=True)
    (other_device / "tree" / "sub" / "x").write_text("x")
    link_tree(other_device / "tree", tmp_path / "tree")
    assert (tmp_path / "tree" / "sub" / "x").read_text() == "x"


def test_a_linked_tree_has_every_file_and_appears_at_once(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "runs" / "1" / "adapter"
    (source / "sub").mkdir(parents=True)
    for name in ("a", "b", "sub/c"):
        (source / name).write_text(name)
    points = 0
    for point in crash_points(lambda: None, lambda say: link_tree(source, target)):
        points += 1
        assert not target.exists() or names_below(target) == ["a", "b", "sub", "sub/c"], point
        if target.exists():
            break
    assert points >= 6
    link_tree(source, target)
    assert os.path.samefile(source / "sub" / "c", target / "sub" / "c")
    assert names_below(target.parent) == ["adapter", "adapter/a", "adapter/b", "adapter/sub", "adapter/sub/c"]


def test_a_tree_with_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "s").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match="symbolic link"):
        link_tree(tmp_path / "source", tmp_path / "target")
    assert not (tmp_path / "target").exists()
