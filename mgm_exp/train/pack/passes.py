"""One forward and backward pass for several trials: their micro-batches one below the other.

What a trial has for itself (connector, label positions, normalizer, loss scale) is computed for itself, as alone; the
LLM's body sees all rows. Rows never see each other there, so that a value that is not finite stays in its trial. With
``train.cuda_graphs=packs`` small passes through the body are replayed (:mod:`mgm_exp.train.pack.graphs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mgm_exp.model.execution import blocks_of
from mgm_exp.model.last_block import LastBlock, learnt_positions
from mgm_exp.model.padding_free import Padding
from mgm_exp.train.engine import PlainEngine
from mgm_exp.train.pack.capture import Recorder
from mgm_exp.train.pack.graphs import Counts, Graphs
from mgm_exp.train.pack.lora import Draws, LowRank, PackedLinear, Rows
from mgm_exp.train.step import Pass

if TYPE_CHECKING:
    from mgm_exp.train.assemble import Stage


class Body:
    """The LLM's body with the updates of all trials.

    Args:
        model: A model over the shared base, without an adapter; its target layers are replaced.
        stages: The trials', with their adapters.
        recorder: Records small passes, of trials without dropout; None: all are launched kernel by kernel.
    """

    def __init__(self, model: Any, stages: Sequence[Stage], recorder: Recorder | None = None) -> None:
        self._rows = Rows()
        factors: list[list[Tensor]] = [[] for _ in stages]
        self._stages = list(stages)
        layers: list[dict[str, Any]] = [
            {name: layer for name, layer in stage.model.named_modules() if hasattr(layer, "lora_A")} for stage in stages
        ]
        for name in layers[0]:
            parent, _, last = name.rpartition(".")
            base = model.get_submodule(name)
            updates = [LowRank.of(own[name]) for own in layers]
            for own, update in zip(factors, updates, strict=True):
                own += [update.down, update.up]
            assert recorder is None or not any(update.dropout for update in updates)
            setattr(model.get_submodule(parent), last, PackedLinear(base, name, updates, self._rows))
        model.train()
        model.requires_grad_(False)
        self._model = model
        self._rows.at_end = model.config.tokenizer_padding_side == "left"
        if stages[0].model.last_block is not None:
            model.last_block = LastBlock(blocks_of(model)[-1], self._rows)
        self._graphs = None if recorder is None else Graphs(self._through, self._rows, factors, recorder)

    @property
    def counts(self) -> Counts | None:
        """What was replayed; None: passes are not recorded."""
        return None if self._graphs is None else self._graphs.counts

    def replays(self, samples: int, longest: int) -> bool:
        """Whether a pass of one trial may be replayed."""
        return self._graphs is not None and self._graphs.is_on and self._graphs.length(samples, longest) is not None

    def let_go_of_graphs(self) -> bool:
        """Frees their memory, and makes no others; False: there are none to let go of."""
        return self._graphs is not None and self._graphs.let_go()

    def take(
        self, trials: Sequence[int], passes: Sequence[Pass], states: Sequence[Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """Forward and backward.

        Args:
            trials: Whose passes these are: numbers of stages.
            passes: With equally many samples.
            states: Of each trial's torch generator.

        Returns:
            For each trial its detached loss, and the state of its generator afterwards. Its gradients are added to
            those that its parameters have; after an error they are what they were.
        """
        engines = [engine for due in passes if isinstance(engine := due.engine, PlainEngine)]
        assert len(engines) == len(passes)
        kept = [{p: p.grad for p in engine.trainable.values() if p.grad is not None} for engine in engines]
        for engine in engines:
            engine.discard()
        device = engines[0].ranks.device
        draws = [Draws(state, device) for state in states]
        try:
            with torch.autocast(device.type, engines[0].dtype, enabled=engines[0].dtype is not torch.float32):
                losses = self._losses(trials, passes, draws)
            begins = [engine.to_differentiate(loss) for engine, loss in zip(engines, losses, strict=True)]
            torch.autograd.backward(begins)
        except BaseException:
            for engine, before in zip(engines, kept, strict=True):
                engine.discard()
                for parameter, gradient in before.items():
                    parameter.grad = gradient
            raise
        for before in kept:
            for parameter, gradient in before.items():
                parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)
        return [(loss.detach().float(), draw.state) for loss, draw in zip(losses, draws, strict=True)]

    def _losses(self, trials: Sequence[int], passes: Sequence[Pass], draws: Sequence[Draws]) -> list[Tensor]:
        models = [self._stages[trial].model for trial in trials]
        batches = [due.micro.on(due.engine.ranks.device) for due in passes]
        merged = [model.merged(batch) for model, batch in zip(models, batches, strict=True)]
        learnt = [learnt_positions(labels) for _, _, labels in merged]
        rows = self._rows
        rows.trials, rows.draws, rows.samples = trials, draws, passes[0].micro.samples
        rows.lengths = [embeds.shape[1] for embeds, _, _ in merged]
        rows.learnt = [
            Padding(places, labels.shape) for (places, _), (_, _, labels) in zip(learnt, merged, strict=True)
        ]
        longest = max(rows.lengths)
        recorded = None if self._graphs is None else self._graphs.length(len(trials) * rows.samples, longest)
        length = recorded or longest
        embeds = torch.cat([rows.widened(given, length) for given, _, _ in merged])
        mask = torch.cat([rows.widened(given[..., None], length)[..., 0] for _, given, _ in merged])
        if self._graphs is not None and recorded is not None:
            hidden = self._graphs.hidden(embeds, mask)
        else:
            hidden = self._model.body(rows.read(length), inputs_embeds=embeds, attention_mask=mask)
        return [
            model.loss_at(part[: len(target)], target, due.normalizer)
            for model, part, (_, target), due in zip(models, hidden, learnt, passes, strict=True)
        ]

    def _through(self, embeds: Tensor, mask: Tensor, positions: Tensor, read: Tensor) -> Tensor:
        """The body, without a question to the device: with a mask (n, T) transformers asks whether all is real."""
        given = {"inputs_embeds": embeds, "attention_mask": seen_from(mask), "position_ids": positions}
        hidden: Tensor = self._model.body(read, **given)
        return hidden


def seen_from(mask: Tensor) -> Tensor:
    """What each token attends to: real ones up to itself; padding to itself, too, so that nothing becomes NaN.

    Args:
        mask: (n, T) bool, True where a token is real.

    Returns:
        (n, 1, T, T) bool, which transformers takes as it is.
    """
    length = mask.shape[1]
    before = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=mask.device)
    return itself | (before & mask[:, None, None, :])
