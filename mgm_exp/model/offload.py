"""Activations kept in host memory between the forward and the backward pass.

What autograd would keep on the GPU is copied to page-locked host memory on a stream of its own, beside the
computation, and back when the backward pass asks for it. Bits stay as they are. Small tensors stay; so do weights,
which are on the GPU anyway. After torchtune's `OffloadActivations` (github.com/pytorch/torchtune).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SMALLEST = 1 << 20
"""Bytes of a tensor from which on the copy pays."""


@dataclass(frozen=True)
class _OnHost:
    """A copy, and the device it goes back to.

    Attributes:
        done: when the copy is whole; None: it is.
    """

    copy: Tensor
    device: torch.device
    done: torch.cuda.Event | None


@contextmanager
def activations_on_host(weights: Iterable[Tensor], smallest: int | None = None) -> Iterator[list[int]]:
    """Inside, what is kept for the backward pass is kept in host memory.

    Args:
        weights: Tensors that stay where they are.
        smallest: Bytes from which on a tensor is moved; None: :data:`SMALLEST`.

    Yields:
        Bytes of each tensor that was moved, as it happens.
    """
    least = SMALLEST if smallest is None else smallest
    held = {tensor.untyped_storage().data_ptr() for tensor in weights}
    # A tensor that several operations keep (queries, keys and values read one input) is copied once
    seen: dict[tuple[Any, ...], tuple[weakref.ref[Any], _OnHost]] = {}
    moved: list[int] = []
    stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    def pack(tensor: Tensor) -> Tensor | _OnHost:
        storage = tensor.untyped_storage()
        if tensor.nbytes < least or storage.data_ptr() in held:
            return tensor
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
        known = seen.get(place)
        if known is not None and known[0]() is storage:
            return known[1]
        moved.append(tensor.nbytes)
        copied = _copied(tensor.detach(), stream)
        seen[place] = weakref.ref(storage), copied
        return copied

    def unpack(kept: Tensor | _OnHost) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if kept.done is not None:
            torch.cuda.current_stream(kept.device).wait_event(kept.done)
        return kept.copy.to(kept.device, non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield moved


def _copied(tensor: Tensor, stream: torch.cuda.Stream | None) -> _OnHost:
    if stream is None or tensor.device.type != "cuda":
        return _OnHost(tensor.to("cpu", copy=True), tensor.device, None)
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(stream):
        host.copy_(tensor, non_blocking=True)
    # Its memory is not given away before the copy has read it
    tensor.record_stream(stream)
    return _OnHost(host, tensor.device, stream.record_event())
