"""Entries that travel through an object store: whole or not at all, and never more than a convenience."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from mgm_exp.errors import ConfigError, MissingDependencyError
from mgm_exp.store import MARK, Mirror, StageOutput, Store, verify, write_atomic

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "file":
        yield f"file://{tmp_path / 'bucket'}"
        return
    yield f"memory://bucket{tmp_path.name}"
    fsspec.filesystem("memory").store.clear()


def produce(root: Path, url: str, text: str = "weights") -> StageOutput:
    """A machine of its own: another folder, the same mirror."""

    def make(work: Path) -> dict[str, int]:
        (work / "out" / "deep").mkdir(parents=True)
        write_atomic(work / "out" / "deep" / "value", text)
        return {"steps": 3}

    return Store(root, mirror=Mirror(url)).produce("train", "k", make, inputs={"seed": 0})


def remote(url: str, name: str) -> list[str]:
    system, root = fsspec.core.url_to_fs(url)
    return [path for path in system.find(root) if path.endswith(name)]


def test_what_one_machine_made_another_one_fetches(url: str, tmp_path: Path) -> None:
    made, fetched = produce(tmp_path / "a", url), produce(tmp_path / "b", url, "not made")
    assert (made.reused, fetched.reused) == (False, True)
    assert (fetched.path / "deep" / "value").read_text() == "weights"
    assert verify(fetched.path) == [] and fetched.meta == {"steps": 3} and fetched.inputs == {"seed": 0}
    assert (fetched.path / MARK).read_bytes() == (made.path / MARK).read_bytes()
    assert [path.name for path in (tmp_path / "b" / "train").iterdir()] == ["k"]


@pytest.mark.parametrize("damage", ["changed", "longer", "missing"])
def test_a_damaged_copy_is_named_not_used_and_replaced(
    url: str, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    produce(tmp_path / "a", url)
    system, (path,) = fsspec.core.url_to_fs(url)[0], remote(url, "/value")
    if damage == "missing":
        system.rm_file(path)
    else:
        system.pipe_file(path, b"weightX" if damage == "changed" else b"weights and more")
    with caplog.at_level(logging.WARNING):
        output = produce(tmp_path / "b", url, "made again")
    assert not output.reused and "value" in caplog.text and "not used" in caplog.text
    assert (produce(tmp_path / "c", url, "x").path / "deep" / "value").read_text() == "made again"


def test_an_upload_that_was_cut_off_is_not_there(url: str, tmp_path: Path) -> None:
    produce(tmp_path / "a", url)
    system, (mark,) = fsspec.core.url_to_fs(url)[0], remote(url, f"/{MARK}")
    system.rm_file(mark)
    assert not produce(tmp_path / "b", url, "made").reused


def test_two_uploads_of_different_content_never_mix(url: str, tmp_path: Path) -> None:
    first = Store(tmp_path / "a").produce("train", "k", lambda work: write_atomic(work / "out" / "v", "1"), inputs={})
    second = Store(tmp_path / "b").produce("train", "k", lambda work: write_atomic(work / "out" / "v", "22"), inputs={})
    mirror = Mirror(url)
    assert mirror.push("train", "k", first.path)
    system, (mark,) = fsspec.core.url_to_fs(url)[0], remote(url, f"/{MARK}")
    before = system.cat_file(mark)
    assert mirror.push("train", "k", second.path)
    system.pipe_file(mark, before)  # the slower one's mark comes last
    assert mirror.fetch("train", "k", tmp_path / "fetched")
    assert (tmp_path / "fetched" / "v").read_text() == "1" and verify(tmp_path / "fetched") == []


def test_a_mark_that_names_a_path_outside_is_refused(url: str, tmp_path: Path) -> None:
    from mgm_exp.store import fingerprint

    produce(tmp_path / "a", url)
    system, (mark,) = fsspec.core.url_to_fs(url)[0], remote(url, f"/{MARK}")
    files = {"../../../outside": {"sha256": "0" * 64, "size": 1, "mtime_ns": 1}}
    content = {"schema_version": 1, "digest": fingerprint(files), "files": files}
    system.pipe_file(mark, json.dumps(content, indent=1, sort_keys=True).encode() + b"\n")
    assert not Mirror(url).fetch("train", "k", tmp_path / "x" / "y" / "z" / "fetched")
    assert not (tmp_path / "x").exists()


def test_a_mirror_that_is_away_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("no folder")
    with caplog.at_level(logging.WARNING):
        output = produce(tmp_path / "a", f"file://{tmp_path / 'file' / 'bucket'}")
    assert not output.reused and (output.path / "deep" / "value").read_text() == "weights"
    assert "is not copied there" in caplog.text


@pytest.mark.parametrize("url", ["s3://key:secret@bucket/x", "s3://bucket/x?token=1", "bucket/x", "nosuch://bucket/x"])
def test_no_passwords_and_no_unknown_places(url: str) -> None:
    with pytest.raises((ConfigError, MissingDependencyError)) as caught:
        Mirror(url)
    assert "secret" not in str(caught.value)
