"""Which file system a path lies on: whether other machines may write there, with locks that this one cannot see."""

from __future__ import annotations

import os
from pathlib import Path

from .files import PathLike

# Kernel file systems of one machine. Whatever is not here (nfs, nfs4, lustre, ceph, cifs, fuse...) may be shared.
_LOCAL = {
    "apfs", "bcachefs", "btrfs", "devtmpfs", "ext2", "ext3", "ext4", "exfat", "f2fs", "jfs", "msdos", "ntfs3",
    "overlay", "ramfs", "reiserfs", "rootfs", "squashfs", "tmpfs", "vfat", "xfs", "zfs",
}  # fmt: skip


def is_shared(path: PathLike) -> bool:
    """Whether other machines may have the file system of ``path``; False where that cannot be found out (no /proc)."""
    kind = file_system(path)
    return bool(kind) and kind not in _LOCAL


def file_system(path: PathLike) -> str:
    """The kind of file system that an existing path lies on, as ``mount`` calls it; empty where that is unknown."""
    device = os.stat(path).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    kinds = [line.partition(" - ")[2].split(" ")[0] for line in lines if line.split(" ")[2] == wanted]
    return kinds[-1] if kinds else _by_place(os.path.realpath(path), lines)


def see_anew(folder: PathLike) -> None:
    """Has this machine forget that there was no such folder, if there is one now.

    A network file system remembers for a while (NFS: up to a minute) which names there are not. Listing what is around
    asks the server; making what is there already fails, and the failure is news that the system does not pass over.
    """
    folder = Path(folder)
    if folder.is_dir() or folder.name not in os.listdir(folder.parent):
        return
    try:
        os.mkdir(folder)
    except FileExistsError:
        return
    os.rmdir(folder)  # it went in this instant


def _by_place(path: str, lines: list[str]) -> str:
    """btrfs and the like number their parts: then the longest mount point above the path."""
    found = ("", "")
    for line in lines:
        place = line.split(" ")[4].encode().decode("unicode_escape")
        if os.path.commonpath([path, place]) == place and len(place) >= len(found[0]):
            found = (place, line.partition(" - ")[2].split(" ")[0])
    return found[1]
