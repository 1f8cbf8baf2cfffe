"""How many go through a model at a time: fewer, once they do not fit into the GPU's memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from mgm_exp.errors import MgmError

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Found = TypeVar("Found")


class Fit:
    """A number of things that are done together, halved aloud each time memory runs out.

    Args:
        size: How many at first.
        what: What they are, for messages: "questions".
        say: Takes a sentence for the user; None: the log's warnings.
    """

    def __init__(self, size: int, what: str, say: Callable[[str], None] | None = None) -> None:
        self.size, self._what = size, what
        self._say = say or log.warning

    def run(self, items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Found]]) -> list[Found]:
        """What ``work`` gives for all items, a part at a time, in their order.

        Raises:
            MgmError: not even one fits.
        """
        import torch

        done: list[Found] = []
        while len(done) < len(items):
            part = items[len(done) : len(done) + self.size]
            try:
                done += work(part)
                continue
            except torch.OutOfMemoryError as error:
                reason = str(error).split(". ")[0]
                if len(part) == 1:
                    raise MgmError(
                        f"Not even one of the {self._what} fits into the GPU's memory ({reason}).",
                        advice="Answer in bf16 (eval.precision=bf16), end what else runs on the GPU, or take a larger "
                        "one.",
                    ) from error
            # Here and not above: while the error is at hand, so are the tensors of the failed attempt.
            self.size = (len(part) + 1) // 2
            torch.cuda.empty_cache()
            self._say(
                f"{len(part)} {self._what} at a time do not fit into the GPU's memory ({reason}): {self.size} now"
            )
        return done


class Whole(Fit):
    """A number that stays: processes that take turns together must not halve by themselves.

    Args:
        size: How many are given at most.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size, "items")

    def run(self, items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Found]]) -> list[Found]:
        return list(work(items))
