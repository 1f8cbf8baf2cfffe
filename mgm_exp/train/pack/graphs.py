"""CUDA graphs of small passes of a pack (``train.cuda_graphs=packs``); read :meth:`Graphs.hidden` first.

A pass through the LLM's body, forward and backward, is some 190 kernels a layer and 20 more for each further trial.
Where passes are small a GPU computes them faster than they can be launched one by one. A graph launches all of them in
one call. Recorded is the body alone: images are merged, losses taken and weights updated as ever, and what is computed
does not depend on whether it is replayed.

A graph is of fixed shapes and addresses, so that

- rows are filled up to a multiple of :data:`BUCKET` positions, lists of those that the loss reads, too, and graphs are
  kept by (trials, samples, both lengths);
- what changes from pass to pass is copied to where the graph reads it; the trials' factors are read where they are;
- gradients are written to one place for all graphs, and handed on as copies: a replay must not change what an optimizer
  or an accumulated gradient holds.

The results of a replay stay until the next one; a pass uses them up before another pass begins.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mgm_exp.train.pack.capture import Recorder, Recording
from mgm_exp.train.pack.lora import Rows

# Positions (trials times samples times length) up to which launches can be what takes longest. An estimate: of MGM-2B's
# body a position is 8 GFLOP forward and backward, 20 us of an H200 at 40 % of its speed, and a pass of eight trials is
# 6,100 kernels of 6 to 8 us; that is as much at 2,000 positions.
POSITIONS = 4096
# Rows are filled up to a multiple of so many: more make fewer graphs and more padding.
BUCKET = 64
# Graphs that are kept; the one that was not used for longest goes first.
MOST = 16
# A pass of a kind is recorded when it comes so often: many kinds come once.
_OFTEN = 2

Through = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass
class Counts:
    """What the graphs of a pack did.

    Attributes:
        replayed, launched: Passes that were, and small ones that were not.
        recorded: Graphs.
    """

    replayed: int = 0
    launched: int = 0
    recorded: int = 0

    def __str__(self) -> str:
        small = self.replayed + self.launched
        return f"{self.replayed} of {small} small passes were replayed by {self.recorded} CUDA graphs"


class Graphs:
    """
    Args:
        body: The LLM's body: (n, T, D) embeddings, (n, T) bool, (n, T) positions, (K, m) places in the flattened pass
            that are read -> (K, m, D). What it reads of ``rows`` has to be in the key of a graph.
        rows: Of the pass.
        factors: Of each trial, all that the body reads of it.
        recorder: Of the device.
    """

    def __init__(self, body: Through, rows: Rows, factors: Sequence[Sequence[Tensor]], recorder: Recorder) -> None:
        self._body, self._rows, self._factors, self._recorder = body, rows, factors, recorder
        self._kept: OrderedDict[Any, _Graph] = OrderedDict()
        self._seen: Counter[Any] = Counter()
        self._landings: dict[int, _Landing] = {}
        self.is_on = True
        self.counts = Counts()

    def length(self, count: int, longest: int) -> int | None:
        """Positions that ``count`` rows of a pass are filled up to; None: it is too large to gain by it."""
        length = -(-longest // BUCKET) * BUCKET
        return length if count * length <= POSITIONS else None

    def hidden(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """The body's hidden states where the loss reads them, differentiable: replayed where such a pass came before.

        Args:
            embeds: (trials * samples, T, D), T of :meth:`length`.
            mask: (trials * samples, T) bool, True where a token is real.

        Returns:
            (trials, m, D), each trial's own places first.

        Raises:
            CannotRecord: the body does what cannot be recorded.
        """
        rows = self._rows
        length = embeds.shape[1]
        given = (embeds, mask, rows.positions(length, embeds.device), rows.read(length, BUCKET))
        device = embeds.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        shapes = (embeds.shape, given[-1].shape)
        key = (tuple(rows.trials), rows.samples, *shapes, embeds.dtype, embeds.requires_grad, autocast)
        factors = [factor for trial in rows.trials for factor in self._factors[trial]]
        graph = self._kept.get(key)
        if graph is None or not graph.reads(factors):
            self._seen[key] += 1
            if not self.is_on or self._seen[key] < _OFTEN:
                self.counts.launched += 1
                return self._body(*given)
            graph = self._kept[key] = self._recorded(given, factors, autocast)
        self._kept.move_to_end(key)
        self.counts.replayed += 1
        graph.fill(given)
        return _Replayed.apply(graph, embeds, *factors)

    def let_go(self) -> bool:
        """Frees what graphs hold, and makes no others; False: that was done before."""
        had, self.is_on = self.is_on, False
        self._kept.clear()
        self._landings.clear()
        return had

    def _recorded(self, given: tuple[Tensor, ...], factors: list[Tensor], autocast: Any) -> _Graph:
        while len(self._kept) >= MOST:
            self._kept.popitem(last=False)
        landings = [self._landing(trial) for trial in self._rows.trials]
        graph = _Graph(self._body, self._rows, given, factors, landings, autocast, self._recorder)
        self.counts.recorded += 1
        return graph

    def _landing(self, trial: int) -> _Landing:
        if trial not in self._landings:
            self._landings[trial] = _Landing(self._factors[trial])
        return self._landings[trial]


class _Landing:
    """Where graphs write the gradients of a trial's factors: one tensor, so that one copy takes them away."""

    def __init__(self, factors: Sequence[Tensor]) -> None:
        self._shapes = [factor.shape for factor in factors]
        self._sizes = [factor.numel() for factor in factors]
        self._flat = factors[0].new_zeros(sum(self._sizes))
        self.parts = self._of(self._flat)

    def copies(self) -> list[Tensor]:
        """What was written, in memory of its own."""
        return self._of(self._flat.clone())

    def _of(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split(self._sizes)
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]


class _Graph:
    """A forward and a backward pass of one shape.

    Args:
        given: What the body was given in a pass of this shape, embeddings first.
        factors: That the body reads of the pass's trials, in their order.
        landings: Of the same trials.
        autocast: The dtype in which products are made; None: there is no autocast.
    """

    def __init__(
        self,
        body: Through,
        rows: Rows,
        given: tuple[Tensor, ...],
        factors: list[Tensor],
        landings: list[_Landing],
        autocast: Any,
        recorder: Recorder,
    ) -> None:
        self._body, self._rows, self._landings, self._autocast = body, rows, landings, autocast
        self._addresses = [factor.data_ptr() for factor in factors]
        # Ordinary memory, not the recordings': other graphs never write here
        self._given = [tensor.detach().clone() for tensor in given]
        self._embeds = self._given[0].requires_grad_(given[0].requires_grad)
        # Leaves of their own over the same memory. The factors themselves must not be differentiated on the recorder's
        # stream: autograd would go on adding up their gradients there.
        self._leaves = [factor.detach().requires_grad_() for factor in factors]
        self._stand_ins = {id(factor): leaf for factor, leaf in zip(factors, self._leaves, strict=True)}
        with torch.no_grad():
            self._grad = torch.zeros_like(self._body(*given))
        self._attached: Tensor | None = None
        recorder.warm_up(lambda: (self._forward(), self._backward()))
        self._there: tuple[Recording, Tensor] = recorder.record(self._forward)
        self._back: tuple[Recording, list[Tensor]] = recorder.record(self._backward)
        self._attached = None

    def reads(self, factors: list[Tensor]) -> bool:
        """Whether the factors are still where they were."""
        return [factor.data_ptr() for factor in factors] == self._addresses

    def fill(self, given: tuple[Tensor, ...]) -> None:
        """Puts a pass to where the graph reads it."""
        with torch.no_grad():
            for here, new in zip(self._given, given, strict=True):
                here.copy_(new)

    def forward(self) -> Tensor:
        """Hidden states of what was filled in, until the next replay of any graph."""
        recording, hidden = self._there
        recording.replay()
        return hidden.detach()  # another object: autograd makes the one that it is given its own

    def backward(self, grad: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        """Gradients of the embeddings and of the factors, in memory of their own."""
        self._grad.copy_(grad)
        recording, embeds = self._back
        recording.replay()
        return (embeds[0].clone() if embeds else None), [part for own in self._landings for part in own.copies()]

    def _forward(self) -> Tensor:
        """What is recorded."""
        device = self._embeds.device.type
        dtype = self._autocast
        # Casts that were kept before this would be read by every replay
        with (
            torch.enable_grad(),
            torch.autocast(device, dtype, enabled=dtype is not None, cache_enabled=False),
            self._rows.replaced(self._stand_ins),
        ):
            self._attached = self._body(*self._given)
        return self._attached.detach()

    def _backward(self) -> list[Tensor]:
        """What is recorded; outside of autocast, as ever."""
        assert self._attached is not None
        wanted = [self._embeds] if self._embeds.requires_grad else []
        with torch.autocast(self._embeds.device.type, enabled=False):
            found = torch.autograd.grad(self._attached, [*wanted, *self._leaves], self._grad)
            parts = [part for own in self._landings for part in own.parts]
            torch._foreach_copy_(parts, found[len(wanted) :])
        return list(found[: len(wanted)])


class _Replayed(torch.autograd.Function):
    """A graph as one differentiable operation of the embeddings and the factors."""

    @staticmethod
    def forward(ctx: Any, graph: _Graph, embeds: Tensor, *factors: Tensor) -> Tensor:
        ctx.graph = graph
        return graph.forward()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        embeds, factors = ctx.graph.backward(grad)
        return None, embeds, *factors
