"""A module whose forward is another one while it trains, and its class's own in evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class WhileTraining:
    """To be set as the ``forward`` of a module.

    Args:
        module: In its training mode ``way`` is called, else what its forward was.
        way: Takes what the module takes.
    """

    def __init__(self, module: nn.Module, way: Callable[..., Any]) -> None:
        self._module, self._way, self._otherwise = module, way, module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self._way if self._module.training else self._otherwise)(*args, **kwargs)
