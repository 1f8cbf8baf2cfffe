"""A batch as one row without padding: what is computed is what is there.

The sequences of a batch stand one after the other; positions begin anew with each, attention does not look across a
border, and the last token of a sequence does not predict the first of the next. Equal to the padded batch in real
arithmetic: other shapes, other rounding. Dropout of LoRA layers draws what it would for the padded batch where those
layers are our own (`train.lora_kernel=fused`), and other masks elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mgm_exp.model import dropout_draws
from mgm_exp.model.configuration import IGNORE_INDEX
from mgm_exp.model.varlen import VARLEN


@dataclass(frozen=True)
class Padding:
    """Where the tokens of a row stood in their padded batch.

    Attributes:
        places: (T,), in the flattened batch.
        shape: (B, L) of the batch.
    """

    places: Tensor
    shape: tuple[int, ...]

    def at(self, places: Tensor) -> Padding:
        """Of some tokens of the row, (n,) positions in it."""
        return Padding(self.places[places], self.shape)

    def dropout(self, x: Tensor, rate: float) -> Tensor:
        """Drops of x (1, T, n) what torch's dropout would drop of the padded (B, L, n)."""
        shape = (*self.shape, x.shape[-1])
        kept = dropout_draws.noise(x, shape, rate, self.places)
        return x * (F.dropout(x.new_ones(shape), rate).flatten(0, 1)[self.places] if kept is None else kept)


@dataclass(frozen=True)
class Row:
    """Sequences in one row.

    Attributes:
        inputs_embeds: (1, T, hidden).
        labels: (1, T); the first of each sequence is not learnt (nothing predicts it).
        borders: (sequences + 1,) int32: where each begins, and T.
        longest: tokens of the longest.
        position_ids: (1, T), from 0 in each sequence.
        padding: where its tokens stood.
    """

    inputs_embeds: Tensor
    labels: Tensor
    borders: Tensor
    longest: int
    position_ids: Tensor
    padding: Padding

    def arguments(self, attention: str) -> dict[str, Any]:
        """What the LLM's body is called with.

        Args:
            attention: Its implementation. One that takes no borders gets a block-diagonal mask, which transformers
                makes of the positions.
        """
        given: dict[str, Any] = {"inputs_embeds": self.inputs_embeds, "position_ids": self.position_ids}
        if attention != VARLEN and not attention.startswith("flash_attention"):
            return given
        given |= {"cu_seq_lens_q": self.borders, "cu_seq_lens_k": self.borders}
        given |= {"max_length_q": self.longest, "max_length_k": self.longest}
        if attention == VARLEN:
            # A mask of four dimensions is taken as it is, so that none of T x T is made
            given["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.labels.device)
        return given


def in_one_row(inputs_embeds: Tensor, attention_mask: Tensor, labels: Tensor) -> Row:
    """
    Args:
        inputs_embeds: (B, L, hidden) as merged and padded.
        attention_mask: (B, L) bool, True where a token is real.
        labels: (B, L).
    """
    counts = attention_mask.sum(1)
    lengths = [length for length in counts.tolist() if length]
    places = attention_mask.flatten().nonzero().squeeze(1)
    device = inputs_embeds.device
    sizes = torch.tensor(lengths, device=device)
    borders = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=device)
    borders[1:] = sizes.cumsum(0)
    starts = borders[:-1].long()
    position_ids = torch.arange(len(places), device=device) - starts.repeat_interleave(sizes, output_size=len(places))
    learnt = labels.flatten()[places]
    learnt[starts] = IGNORE_INDEX
    return Row(
        inputs_embeds=inputs_embeds.flatten(0, 1)[places][None],
        labels=learnt[None],
        borders=borders,
        longest=max(lengths),
        position_ids=position_ids[None],
        padding=Padding(places, (attention_mask.shape[0], attention_mask.shape[1])),
    )
