"""The LLM's last block at the positions that are read: by the loss (`train.last_block=learnt`), or by an answer.

Keys and values of every position reach the others through attention. What comes after the last block's attention
(its output layer, both sums, norm and MLP, then the body's last norm) is each position's own, and the loss reads it
where the next token is learnt: nowhere in an image, a prompt or padding. So nothing is computed there, forward or
backward. Equal in real arithmetic; products of fewer rows may round otherwise, and sums leave out zeros.

Of MGM-2B, whose output layer and MLP are 95 % of a block, this saves 5 % of the LLM's operations where one position in
ten is learnt, or where one answers (:func:`answering`): of a prompt only the last position is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgm_exp.model.configuration import IGNORE_INDEX
from mgm_exp.model.while_training import WhileTraining


def learnt_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where a batch learns, and what.

    Args:
        labels: (B, L), merged.

    Returns:
        (N,) positions in the flattened batch whose next token is learnt, and (N,) these tokens.
    """
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
    places = (following != IGNORE_INDEX).nonzero().squeeze(1)
    return places, following[places]


class Follower(Protocol):
    """Who must know of which rows a layer sees: dropout, which draws for all of them."""

    is_narrow: bool


class LastBlock:
    """Makes a block give, inside of :meth:`reading` and while it trains, what is read of it; else it is what it was.

    Args:
        block: A decoder layer of Gemma or Llama, with its adapter.
        follower: Is told while the layers behind attention run.
    """

    def __init__(self, block: Any, follower: Follower | None = None) -> None:
        self._block, self._follower, self._plain = block, follower, block.forward
        self._read: Tensor | None = None  # by the pass that runs
        block.forward = self._forward

    @contextmanager
    def reading(self, places: Tensor) -> Iterator[None]:
        """Around a forward pass.

        Args:
            places: (rows, n) positions in the flattened batch: what the block, and so the body, returns.
        """
        self._read = places
        try:
            yield
        finally:
            self._read = None

    def _forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        block = self._block
        if self._read is None or not block.training:
            return self._plain(hidden, **kwargs)  # type: ignore[no-any-return]
        run: Callable[[Tensor], Tensor] = partial(self._at, self._read, given=kwargs)
        if block.gradient_checkpointing:
            return block._gradient_checkpointing_func(run, hidden)  # type: ignore[no-any-return]
        return run(hidden)

    def _at(self, places: Tensor, hidden: Tensor, given: dict[str, Any]) -> Tensor:
        """(B, L, D) -> (rows, n, D)"""
        try:
            return _narrow(self._block, hidden, places, given, lambda: self._tell(True))
        finally:
            self._tell(False)

    def _tell(self, is_narrow: bool) -> None:
        if self._follower is not None:
            self._follower.is_narrow = is_narrow


@contextmanager
def answering(block: Any) -> Iterator[None]:
    """Around the pass that reads prompts: the last block gives the last position of each row alone.

    Args:
        block: Of a body that does not train; what it is, and keys and values of all positions, stay as they were.
    """
    before = vars(block).get("forward")

    def forward(hidden: Tensor, **kwargs: Any) -> Tensor:
        rows, length = hidden.shape[:2]
        last = torch.arange(1, rows + 1, device=hidden.device)[:, None] * length - 1
        return _narrow(block, hidden, last, kwargs)

    block.forward = forward
    try:
        yield
    finally:
        del block.forward
        if before is not None:
            block.forward = before


def _narrow(
    block: Any, hidden: Tensor, places: Tensor, given: dict[str, Any], on_narrow: Callable[[], None] | None = None
) -> Tensor:
    """What a block gives at some places: (B, L, D) -> (rows, n, D).

    Args:
        places: (rows, n), in the flattened batch.
        given: What else the block is called with.
        on_narrow: Called when what follows attention begins.
    """

    def narrow(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if on_narrow is not None:
            on_narrow()
        return _rows(args[0], places), *args[1:]

    # Now, not once: an adapter may have been put around this layer since
    with block.self_attn.o_proj.register_forward_pre_hook(narrow):
        attended, _ = block.self_attn(hidden_states=block.input_layernorm(hidden), **given)
    kept = _rows(hidden, places) + attended
    found: Tensor = kept + block.mlp(block.post_attention_layernorm(kept))
    return found


def is_plain_in_evaluation(module: nn.Module) -> bool:
    """Whether a module's forward is its class's own when it does not train, whatever it is then."""
    own = vars(module).get("forward")
    return own is None or isinstance(own, WhileTraining) or isinstance(getattr(own, "__self__", None), LastBlock)


def _rows(x: Tensor, places: Tensor) -> Tensor:
    return x.flatten(0, 1)[places]
