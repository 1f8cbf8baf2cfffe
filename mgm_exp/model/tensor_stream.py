"""Writes a safetensors file one tensor at a time, so that a file of any size takes the memory of its largest tensor.

The format (github.com/huggingface/safetensors, "Format"): the header's length in 8 bytes, the header as JSON, the
tensors' bytes without gaps. The library's own writer wants all tensors of a file at once, and copies them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def stream_tensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, tensors: Iterable[tuple[str, Tensor]]
) -> int:
    """Writes a file whole or not at all (beside, fsync, rename).

    Args:
        path: The file.
        shapes: Of all its tensors, by name.
        dtype: Of all its tensors.
        tensors: Each of them once, in any order.

    Returns:
        Bytes of the tensors.

    Raises:
        ValueError: a tensor is missing, one too many, or of another shape or dtype than was said.
    """
    size = torch.finfo(dtype).bits // 8
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    for name, shape in shapes.items():
        starts[name], end = end, end + math.prod(shape) * size
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, tensor in tensors:
                start = starts.pop(name, None)
                if start is None or tuple(tensor.shape) != shapes[name] or tensor.dtype != dtype:
                    raise ValueError(f"{name} was not to be written, or not as {tuple(tensor.shape)} {tensor.dtype}")
                file.seek(8 + len(text) + start)
                file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            if starts:
                raise ValueError(f"{len(starts)} tensors were not given, first {min(starts)}")
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return end
