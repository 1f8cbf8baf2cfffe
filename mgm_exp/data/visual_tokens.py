"""Visual tokens of images, encoded once and read while training: for a frozen connector only.

A folder holds ``tokens.safetensors`` (one tensor ``tokens`` (n_images, N, hidden)) and ``index.json`` (image path ->
row). Neither writing nor reading holds more than a few images in memory.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgm_exp.errors import DataError
from mgm_exp.store import disk_full_named, read_json, write_json_atomic

if TYPE_CHECKING:
    from torch import Tensor

TOKENS, INDEX = "tokens.safetensors", "index.json"
_DTYPES = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16"}


class VisualTokens:
    """Cached visual tokens, memory-mapped; cheap to hand to reading processes.

    Args:
        folder: As :func:`write_visual_tokens` writes it.

    Raises:
        DataError: the folder is incomplete.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        try:
            self.rows: dict[str, int] = read_json(self.folder / INDEX)
        except (FileNotFoundError, ValueError) as error:
            raise DataError(
                f"{self.folder} holds no visual tokens ({error}).", advice="Run the features stage again."
            ) from error
        self._open()

    def _open(self) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            self._slice = safe_open(str(self.folder / TOKENS), framework="pt").get_slice("tokens")
        except (FileNotFoundError, SafetensorError) as error:
            raise DataError(
                f"{self.folder / TOKENS} cannot be read ({error}).", advice="Run the features stage again."
            ) from error
        self.shape: tuple[int, ...] = tuple(self._slice.get_shape())

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "rows": self.rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self.rows)

    def get(self, image: str) -> Tensor:
        """The tokens of an image (N, hidden), in the dtype that they were written in.

        Raises:
            DataError: the image was not encoded.
        """
        row = self.rows.get(image)
        if row is None:
            raise DataError(
                f"The image {image} has no visual tokens in {self.folder}.", advice="Run the features stage again."
            )
        tokens: Tensor = self._slice[row]
        return tokens

    def zeros(self) -> Tensor:
        """What a text-only sample carries (N, hidden)."""
        import torch

        tokens: Tensor = torch.zeros_like(self._slice[0])
        return tokens


def write_visual_tokens(
    images: Iterable[str],
    encode: Callable[[list[str]], Tensor],
    out: Path,
    *,
    batch_size: int = 32,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> int:
    """Encodes images and writes their tokens.

    Args:
        images: Image paths; each is encoded once, in the order given.
        encode: Gives the tokens (b, N, hidden) of b image paths. The batch size belongs to the bits of the result.
        out: Existing folder.
        batch_size: Images of one call; the last call may have fewer.
        on_progress: Called with (what, images done, images in all).

    Returns:
        The number of images.

    Raises:
        DataError: there is no image.
        ValueError: ``encode`` gave another number of rows than images, or another shape than before.
    """
    import torch

    paths = list(dict.fromkeys(images))
    if not paths:
        raise DataError(
            "There is no image to encode.", advice="Use train.cache_visual_tokens=false for text-only data."
        )
    partial = out / f"{TOKENS}.partial"
    shape: tuple[int, ...] = ()
    dtype = None
    with disk_full_named(out / TOKENS), open(partial, "wb") as file:
        for start in range(0, len(paths), batch_size):
            names = paths[start : start + batch_size]
            tokens = encode(names).detach().to("cpu").contiguous()
            if not start:
                shape, dtype = (len(paths), *tokens.shape[1:]), tokens.dtype
                file.write(_header(shape, str(dtype), tokens.element_size()))
            if tuple(tokens.shape) != (len(names), *shape[1:]) or tokens.dtype != dtype:
                raise ValueError(
                    f"{len(names)} images gave tokens of shape {tuple(tokens.shape)} and {tokens.dtype}; expected are "
                    f"{(len(names), *shape[1:])} and {dtype}"
                )
            file.write(tokens.view(torch.uint8).numpy().tobytes())
            if on_progress is not None:
                on_progress("encode images", start + len(names), len(paths))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, out / TOKENS)
    write_json_atomic(out / INDEX, {path: row for row, path in enumerate(paths)}, indent=None)
    return len(paths)


def _header(shape: tuple[int, ...], dtype: str, element_size: int) -> bytes:
    """The beginning of a safetensors file with the one tensor ``tokens``."""
    size = element_size
    for side in shape:
        size *= side
    entry = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [0, size]}
    text = json.dumps({"__metadata__": {"format": "pt"}, "tokens": entry}).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
