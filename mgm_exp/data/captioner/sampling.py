"""Sampling in which every image has a seed of its own, so that what it draws does not depend on its batch.

Transformers draws for a whole batch from one generator; here each row inverts its own distribution at its own numbers.
Used as a logits processor of a greedy `generate`: only the token that was drawn is left to be chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor


class SeededSampling(LogitsProcessor):
    """Nucleus sampling (Holtzman et al., 2020, arXiv 1904.09751) with one seed for each row.

    Args:
        seeds: One for each row of the batch, 0..2**63 - 1.
        temperature: Logits are divided by it; above 0.
        top_p: The most probable tokens that together have at least this probability can be drawn, 0..1.
        steps: Most tokens of a row.
    """

    def __init__(self, seeds: Sequence[int], *, temperature: float, top_p: float, steps: int) -> None:
        drawn = [np.random.Generator(np.random.PCG64(seed)).random(steps) for seed in seeds]
        self._uniform = torch.from_numpy(np.stack(drawn))  # (B, steps)
        self._temperature, self._top_p = temperature, top_p
        self._step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Minus infinity for all tokens but one in each row. scores: (B, vocabulary)."""
        probabilities = (scores.double() / self._temperature).softmax(-1)
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        reached = ordered.cumsum(-1)
        in_nucleus = reached - ordered < self._top_p  # the first always is
        mass = (ordered * in_nucleus).sum(-1, keepdim=True)
        point = self._uniform[:, self._step, None].to(scores.device) * mass
        self._step += 1
        place = (reached <= point).sum(-1, keepdim=True)
        place = torch.minimum(place, in_nucleus.sum(-1, keepdim=True) - 1)
        return torch.full_like(scores, -torch.inf).scatter(-1, order.gather(-1, place), 0.0)
