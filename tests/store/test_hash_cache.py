"""A remembered hash is used only for a file that cannot have changed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from mgm_exp.store import cached_file_sha256s, cached_tree_fingerprint, hash_cache, read_json


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a").write_text("1")
    (folder / "b").write_text("2")
    return folder


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read to be hashed."""
    seen: list[str] = []
    real = hash_cache.file_sha256
    monkeypatch.setattr(hash_cache, "file_sha256", lambda path: seen.append(Path(path).name) or real(path))
    return seen


def settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the files old enough to be remembered."""
    now = time.time() + 60
    monkeypatch.setattr(hash_cache.time, "time", lambda: now)


def test_an_unchanged_file_is_read_once(
    tree: Path, tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(monkeypatch)
    cache = tmp_path / "store" / "fingerprints.json"
    first = cached_tree_fingerprint([tree], cache)
    assert cached_tree_fingerprint([tree], cache) == first
    assert reads == ["a", "b"]


def test_a_changed_file_is_read_again_even_if_its_size_and_time_are_as_before(
    tree: Path, tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(monkeypatch)
    cache = tmp_path / "fingerprints.json"
    first = cached_tree_fingerprint([tree], cache)
    before = (tree / "a").stat()
    (tree / "a").write_text("3")
    os.utime(tree / "a", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert cached_tree_fingerprint([tree], cache) != first
    assert reads == ["a", "b", "a"]


def test_a_file_that_was_just_written_is_not_remembered(tree: Path, tmp_path: Path, reads: list[str]) -> None:
    cache = tmp_path / "fingerprints.json"
    cached_tree_fingerprint([tree], cache)
    cached_tree_fingerprint([tree], cache)
    assert reads == ["a", "b", "a", "b"]
    assert not cache.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"schema_version": 9}', b'{"schema_version": 1, "files": 3}'])
def test_a_damaged_cache_is_rebuilt(
    tree: Path, tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(monkeypatch)
    cache = tmp_path / "fingerprints.json"
    expected = cached_tree_fingerprint([tree], tmp_path / "other.json")
    cache.write_bytes(content)
    assert cached_tree_fingerprint([tree], cache) == expected
    assert len(read_json(cache)["files"]) == 2


def test_the_order_and_number_of_folders_count(tree: Path, tmp_path: Path) -> None:
    other = tmp_path / "tower"
    other.mkdir()
    (other / "a").write_text("9")
    cache = tmp_path / "fingerprints.json"
    prints = {cached_tree_fingerprint(folders, cache) for folders in ([tree], [tree, other], [other, tree])}
    assert len(prints) == 3


def test_files_whose_links_are_resolved_share_their_hashes_with_others(
    tree: Path, tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(monkeypatch)
    cache = tmp_path / "fingerprints.json"
    link = tmp_path / "link"
    link.symlink_to(tree / "a")
    resolved = Path(os.path.realpath(link))
    by_link = cached_file_sha256s([link], cache)[link]
    assert cached_file_sha256s([resolved], cache, are_resolved=True) == {resolved: by_link}
    assert reads == ["a"]
    (tree / "a").write_text("other")
    assert cached_file_sha256s([resolved], cache, are_resolved=True)[resolved] != by_link
