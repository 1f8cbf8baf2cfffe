"""What a network file system does to names: deleted files that stay, and folders that are remembered as missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from mgm_exp.store import is_shared, publish_folder, verify
from mgm_exp.store.mounts import file_system, see_anew


def test_a_deleted_file_that_nfs_keeps_while_it_is_open_is_no_part_of_a_sealed_folder(tmp_path: Path) -> None:
    folder = tmp_path / "k.tmp"
    folder.mkdir()
    (folder / "value").write_text("1")
    kept = folder / ".nfs0000000000a1b2c300000001"
    kept.write_text("the old value")
    final = publish_folder(folder, tmp_path / "k")
    assert verify(final) == []
    (final / kept.name).unlink()  # closed at last
    assert verify(final) == []


def test_a_disk_of_this_machine_is_not_shared(tmp_path: Path) -> None:
    if not Path("/proc/self/mountinfo").exists():
        pytest.skip("no /proc")
    assert file_system(tmp_path) in ("tmpfs", "ext4", "xfs", "btrfs", "overlay") and not is_shared(tmp_path)


@pytest.mark.parametrize("is_there", [True, False])
def test_looking_anew_changes_nothing(tmp_path: Path, is_there: bool) -> None:
    if is_there:
        (tmp_path / "k").mkdir()
        (tmp_path / "k" / "value").write_text("1")
    see_anew(tmp_path / "k")
    assert [path.name for path in tmp_path.iterdir()] == (["k"] if is_there else [])
