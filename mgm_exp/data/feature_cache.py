"""Tensors of images, kept in the store: made once, taken up by every stage, trial and evaluation that needs the same.

    cache = FeatureCache(store, IMAGE_FEATURES, what, budget_gb=50)     # what: everything that decides on the bits
    cache.get("3f..:pad")                       # {"low": ...}, or None
    cache.put(["3f..:pad"], {"low": ...})       # kept in memory until a shard is full, or flush()

Each image has entries of its own, by the content of its file; shards of them are published in the store, sealed and
whole or not at all, under ``<key of what>-<hash of the names>``. A shard is never changed: more images are more shards,
so that what was kept before an interruption stays. Shards are mapped, not read; processes that share a machine share
their pages.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgm_exp.errors import DataError
from mgm_exp.store import Store, fingerprint, read_json, stage_key, write_json_atomic

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_FEATURES, RESIZED_IMAGES = "image_features", "resized_images"
# Bumped by hand when what is written changes.
VERSION = {IMAGE_FEATURES: 1, RESIZED_IMAGES: 1}
TENSORS, NAMES = "tensors.safetensors", "names.json"
BLANK = "blank"
"""The name of the zeros that a row without an image carries."""
SHARD_BYTES = 256 << 20
"""A shard ends when it has so many: what a kill costs at most, and what is held in memory while it fills."""
# The rest of a disk is left to checkpoints and results.
_SHARE_OF_FREE = 0.9


class FeatureCache:
    """See the module.

    Args:
        store: Where it lies.
        stage: :data:`IMAGE_FEATURES` or :data:`RESIZED_IMAGES`: a budget each.
        what: What decides on the bits of an entry besides the image: plain values.
        budget_gb: Most gigabytes (10^9 bytes) of this stage in the store, whoever made them; None: as the disk allows.
    """

    def __init__(self, store: Store, stage: str, what: Mapping[str, Any], *, budget_gb: float | None = None) -> None:
        # Copies of gigabytes that any machine can make again do not go to a mirror
        self._store = Store(store.root, ttl_s=store.ttl_s, grace_s=store.grace_s)
        self.stage, self.what, self._budget = stage, dict(what), budget_gb
        self.key = stage_key(stage, VERSION[stage], self.what)
        self._shards: set[str] = set()
        self._places: dict[str, tuple[Path, int]] = {}
        self._waiting: list[tuple[list[str], dict[str, Tensor]]] = []
        self._waiting_bytes = 0
        self.refresh()

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __len__(self) -> int:
        """Names that have an entry; a square image has one for each aspect."""
        return len(self._places)

    def refresh(self) -> None:
        """Takes up the shards that were published since the last look."""
        for key in self._store.keys(self.stage, f"{self.key}-"):
            if key in self._shards:
                continue
            entry = self._store.entry(self.stage, key)
            if entry is None or not self._store.touch(entry):
                continue
            self._shards.add(key)
            for row, names in enumerate(_names_of(entry.path)):
                for name in names:
                    self._places.setdefault(name, (entry.path, row))

    def get(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of an image, in the type that they were made in; None: there are none.

        Raises:
            DataError: a shard has gone since it was found.
        """
        place = self._places.get(name)
        if place is None:
            return None
        folder, row = place
        return {key: tensor[row] for key, tensor in _tensors_of(folder).items()}

    def lease(self) -> Any:
        """Held by whoever fills it: others wait, and find what was made."""
        return self._store.lease(self.stage, self.key)

    def room(self) -> int:
        """Bytes that may be added; see :func:`room_in`."""
        return max(0, room_in(self._store, self.stage, self._budget) - self._waiting_bytes)

    def put(self, names: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        """Keeps an image's tensors under its names; publishes a shard when there is enough for one."""
        self._waiting.append((list(names), {key: tensor.detach().to("cpu").clone() for key, tensor in tensors.items()}))
        self._waiting_bytes += size_of(tensors)
        if self._waiting_bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Publishes what waits.

        Raises:
            DiskFullError: there is no room for it.
        """
        waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        self.refresh()  # another process may have made some of it
        rows = [(names, tensors) for names, tensors in waiting if not all(name in self for name in names)]
        if not rows:
            return
        import torch
        from safetensors.torch import save_file

        names = [names for names, _ in rows]

        def make(work: Path) -> dict[str, Any]:
            stacked = {key: torch.stack([tensors[key] for _, tensors in rows]) for key in rows[0][1]}
            save_file(stacked, work / "out" / TENSORS)
            write_json_atomic(work / "out" / NAMES, names, indent=None)
            return {"images": len(rows), "bytes": sum(map(size_of, (tensors for _, tensors in rows)))}

        content = fingerprint(names)[:16]
        self._store.produce(self.stage, f"{self.key}-{content}", make, inputs=self.what)
        self.refresh()


def used_in(store: Store, stage: str) -> int:
    """Bytes of a stage in the store, of every model and every image."""
    used = 0
    for key in store.keys(stage):
        try:
            used += (store.folder(stage, key) / TENSORS).stat().st_size
        except FileNotFoundError:  # collected meanwhile
            continue
    return used


def room_in(store: Store, stage: str, budget_gb: float | None) -> int:
    """Bytes that may be added to a stage, by the budget and by what is free on the disk."""
    folder = store.root
    while not folder.exists():
        folder = folder.parent
    room = int(_SHARE_OF_FREE * shutil.disk_usage(folder).free)
    return room if budget_gb is None else max(0, min(room, int(budget_gb * 1e9) - used_in(store, stage)))


def _names_of(folder: Path) -> list[list[str]]:
    names: list[list[str]] = read_json(folder / NAMES)
    return names


@cache
def _tensors_of(folder: Path) -> dict[str, Any]:
    """Slices of a shard's tensors; the map stays open for the process's next trials. Published shards never change."""
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(str(folder / TENSORS), framework="pt")
    except (FileNotFoundError, SafetensorError) as error:
        raise DataError(
            f"{folder / TENSORS} cannot be read ({error}).", advice="Give the same command again: it is made anew."
        ) from error
    return {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - no mapping


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of an image's tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def name_of(sha256: str, aspect: str) -> str:
    """The name of an image's entry: its file's content, and how it becomes a square."""
    return f"{sha256[:32]}:{aspect}"


def names_of_image(sha256: str, aspect: str, size: tuple[int, int]) -> list[str]:
    """All names that an image's tensors go by: one that is square already is the same in every aspect."""
    aspects = ("pad", "square") if size[0] == size[1] else (aspect,)
    return [name_of(sha256, one) for one in aspects]


def image_sha256s(root: Path | str, images: Sequence[str], cache: Path) -> dict[str, str]:
    """SHA-256 of image files; of one in a tar shard, of the shard's and its name. Unchanged files are not read again.

    Args:
        cache: Where the store remembers hashes of files.

    Raises:
        DataError: one cannot be read (any more).
    """
    from mgm_exp.data.images import ImageFault, Locator
    from mgm_exp.data.tar_members import split_member
    from mgm_exp.store import cached_file_sha256s

    places: dict[str, tuple[Path, str]] = {}
    locator = Locator(root)
    for image in dict.fromkeys(images):
        file, member = split_member(image) or (image, "")
        try:
            places[image] = locator.locate(file), member
        except ImageFault as fault:
            raise _gone(root, image, fault) from fault
    try:
        known = cached_file_sha256s([path for path, _ in places.values()], cache, are_resolved=True)
    except FileNotFoundError as error:
        gone = next(image for image, (path, _) in places.items() if not path.exists())
        raise _gone(root, gone, error) from error
    return {image: _packed(known[path], member) for image, (path, member) in places.items()}


def _packed(sha256: str, member: str) -> str:
    return hashlib.sha256(f"{sha256} {member}".encode()).hexdigest() if member else sha256


def _gone(root: Path | str, image: str, why: Exception) -> DataError:
    return DataError(
        f"The image {image} cannot be read any more ({why}) below {root}; it could when the data was curated.",
        advice="Put the file back, or give the command again: changed data is curated anew.",
    )


class ImageFeatures:
    """The cached tensors of one dataset's images.

    Args:
        cache: With or without all of them.
        names: Image path -> name in the cache, of the images that may be there.
    """

    def __init__(self, cache: FeatureCache, names: Mapping[str, str]) -> None:
        self._cache, self._names = cache, names

    def get(self, image: str | None) -> dict[str, Tensor] | None:
        """The tensors of an image (None: of the zeros in place of one); None where there are none."""
        name = BLANK if image is None else self._names.get(image)
        return None if name is None else self._cache.get(name)

    def missing(self, images: Sequence[str | None]) -> int:
        """How many of these images have none."""
        names = {BLANK if image is None else self._names[image] for image in images}
        return sum(name not in self._cache for name in names)
