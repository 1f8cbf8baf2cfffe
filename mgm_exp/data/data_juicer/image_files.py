"""Images as Data-Juicer wants them: absolute paths of files, inside the image root, none in a tar shard."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from mgm_exp.data.data_juicer.pairs import Pair
from mgm_exp.data.images import locate, read_image_file
from mgm_exp.data.tar_members import split_member


def image_files(pairs: Iterable[Pair], root: Path, unpack_to: Path | None) -> list[str | None]:
    """The image file of each pair; None where there is none.

    Args:
        pairs: Their images are relative to ``root``.
        root: The image root; a path that leads out of it is refused.
        unpack_to: Where images in tar shards are written; made if needed. None: they have no file.

    Raises:
        ImageFault: a path is malformed or leads out of the root, or a shard cannot be read.
    """
    return [None if pair.image is None else _file(pair.image, root, unpack_to) for pair in pairs]


def _file(image: str, root: Path, unpack_to: Path | None) -> str | None:
    if split_member(image) is None:
        return str(locate(root, image))
    if unpack_to is None:
        return None
    content = read_image_file(root, image)
    unpack_to.mkdir(parents=True, exist_ok=True)
    # Names in archives may lead anywhere; a digest does not.
    target = unpack_to / hashlib.sha256(image.encode()).hexdigest()
    target.write_bytes(content)
    return str(target)
