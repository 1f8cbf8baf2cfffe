"""The global random generators (python, numpy, torch): a stage's own while it runs, and their states as plain data."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mgm_exp.train.job import derived_seed

if TYPE_CHECKING:
    import torch


@contextmanager
def own_generators(seed: int, device: torch.device) -> Iterator[None]:
    """All generators start from ``seed`` inside; outside they go on as if nothing had been drawn."""
    import numpy as np
    import torch

    before = generator_states(device)
    random.seed(derived_seed(seed, "python"))
    np.random.seed(derived_seed(seed, "numpy") % 2**32)
    torch.manual_seed(derived_seed(seed, "torch"))
    try:
        yield
    finally:
        set_generator_states(before, device)


class OwnGenerators:
    """The global generators of one of several stages that train in one process: each finds them as it left them.

    Args:
        seed: As for :func:`own_generators`.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._device = device
        with own_generators(seed, device):
            self._states = self._taken()

    @property
    def torch(self) -> torch.Tensor:
        """The state of torch's generator on the device that computes."""
        return self._states[-1]

    @torch.setter
    def torch(self, state: torch.Tensor) -> None:
        self._states[-1] = state

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """They are the global ones inside; outside, those that were there before."""
        before = self._taken()
        self._put(self._states)
        try:
            yield
        finally:
            self._states = self._taken()
            self._put(before)

    def _taken(self) -> list[Any]:
        import numpy as np
        import torch

        states: list[Any] = [random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()]
        return [*states, torch.cuda.get_rng_state(self._device)] if self._device.type == "cuda" else states

    def _put(self, states: list[Any]) -> None:
        import numpy as np
        import torch

        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(states[3], self._device)


def generator_states(device: torch.device) -> dict[str, Any]:
    """The states of python's, numpy's and torch's global generators, as plain lists and hexadecimal digits."""
    import numpy as np
    import torch

    version, internal, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    states: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": {
            "bit_generator": numpy_state["bit_generator"],
            "key": [int(word) for word in numpy_state["state"]["key"]],
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": bytes(torch.get_rng_state().tolist()).hex(),
    }
    if device.type == "cuda":
        states["cuda"] = bytes(torch.cuda.get_rng_state(device).tolist()).hex()
    return states


def set_generator_states(states: dict[str, Any], device: torch.device) -> None:
    """Puts back what :func:`generator_states` gave."""
    import numpy as np
    import torch

    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    saved = states["numpy"]
    np.random.set_state(
        {
            "bit_generator": saved["bit_generator"],
            "state": {"key": np.array(saved["key"], dtype=np.uint32), "pos": saved["pos"]},
            "has_gauss": saved["has_gauss"],
            "gauss": saved["gauss"],
        }
    )
    torch.set_rng_state(torch.tensor(list(bytes.fromhex(states["torch"])), dtype=torch.uint8))
    if device.type == "cuda":
        torch.cuda.set_rng_state(torch.tensor(list(bytes.fromhex(states["cuda"])), dtype=torch.uint8), device)
