"""How a CUDA graph is recorded: what a GPU is asked to do is kept as one thing, and asked again in one call.

A recording is of addresses: what is read and written by a replay are the tensors that were read and written then.
Nothing of Python runs again, and nothing in it may wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

from mgm_exp.errors import TrainingFailed

Found = TypeVar("Found")
# Libraries set themselves up in the first passes, and so does autograd: not a thing to record. As torch's own
# `make_graphed_callables`.
_WARM_UPS = 3


class CannotRecord(TrainingFailed):
    """A pass does something that a CUDA graph cannot hold."""


class Recording(Protocol):
    """What was recorded."""

    def replay(self) -> Any:
        """Does it again, on the same addresses."""


class Recorder(Protocol):
    """Records on one device."""

    def warm_up(self, work: Callable[[], Any]) -> None:
        """Does the work as often as it takes until it can be recorded."""

    def record(self, work: Callable[[], Found]) -> tuple[Recording, Found]:
        """
        Returns:
            The recording, and what ``work`` returned: tensors that hold nothing yet, and what was computed after each
            replay, until another recording of the same recorder is replayed.

        Raises:
            CannotRecord: it waits for the device, say.
            torch.OutOfMemoryError: there is no room for it.
        """


class CudaRecorder:
    """Graphs of one GPU that are replayed one after another: all share one pool of memory.

    What a graph needs between its own operations may lie where another graph has it, or its results: these have to be
    read before another one is replayed.

    Args:
        device: A GPU.
    """

    def __init__(self, device: torch.device) -> None:
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            # The same one for warming up: libraries keep workspaces for each stream
            self._stream = torch.cuda.Stream()
        self._device = device

    def warm_up(self, work: Callable[[], Any]) -> None:
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UPS):
                    work()
            torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, work: Callable[[], Found]) -> tuple[Recording, Found]:
        recording = torch.cuda.CUDAGraph()
        try:
            # thread_local: threads that watch the run, pin memory or write checkpoints may ask the driver meanwhile
            # The stream is put back here: torch leaves its own where a capture was broken off
            with (
                torch.cuda.device(self._device),
                torch.cuda.stream(torch.cuda.current_stream(self._device)),
                torch.cuda.graph(recording, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                found = work()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # Leaving a capture that memory broke off is an error of its own, raised after the first one
            if isinstance(error.__context__, torch.OutOfMemoryError):
                raise error.__context__ from None
            first = error.__context__ or error
            raise CannotRecord(
                f"train.cuda_graphs=packs: a pass could not be recorded as a CUDA graph ({first}).",
                advice="Use train.cuda_graphs=none; the same command then trains without them.",
            ) from error
        return recording, found
