"""Sampling with a seed for each row: the right distribution, whatever else is in the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mgm_exp.data.captioner.sampling import SeededSampling


def drawn(logits: list[float], seeds: list[int], *, temperature: float = 1.0, top_p: float = 1.0) -> list[int]:
    sampling = SeededSampling(seeds, temperature=temperature, top_p=top_p, steps=2)
    scores = torch.tensor([logits] * len(seeds))
    result = sampling(torch.zeros((len(seeds), 1), dtype=torch.long), scores)
    assert (result > -torch.inf).sum(-1).tolist() == [1] * len(seeds)
    return result.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_with_their_probability(temperature: float) -> None:
    logits = [0.0, 1.0, 2.0, -1.0]
    counts = np.bincount(drawn(logits, list(range(4000)), temperature=temperature), minlength=4)
    expected = np.exp(np.array(logits) / temperature)
    expected = 4000 * expected / expected.sum()
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 16.3  # 0.1 % of such tests, with three degrees of freedom


def test_the_nucleus_is_renormalised_and_nothing_else_is_drawn() -> None:
    # Probabilities 0.4, 0.3, 0.2, 0.1: the first two reach 0.7, the first three 0.75.
    logits = np.log([0.2, 0.4, 0.1, 0.3]).tolist()
    counts = np.bincount(drawn(logits, list(range(3000)), top_p=0.69), minlength=4)
    assert counts[0] == counts[2] == 0 and abs(counts[1] / 3000 - 4 / 7) < 0.04
    assert set(drawn(logits, list(range(300)), top_p=0.75)) == {0, 1, 3}
    assert set(drawn(logits, list(range(300)), top_p=0.1)) == {1}


@given(
    st.lists(st.lists(st.floats(-20, 20), min_size=5, max_size=5), min_size=1, max_size=4),
    st.lists(st.integers(0, 2**63 - 1), min_size=4, max_size=4),
    st.floats(0.01, 1.0),
)
def test_a_row_does_not_see_its_neighbours(logits: list[list[float]], seeds: list[int], top_p: float) -> None:
    scores, given_seeds = torch.tensor(logits), seeds[: len(logits)]
    ids = torch.zeros((len(logits), 1), dtype=torch.long)
    together = SeededSampling(given_seeds, temperature=1.0, top_p=top_p, steps=3)
    first, second = together(ids, scores), together(ids, scores)
    for k, seed in enumerate(given_seeds):
        alone = SeededSampling([seed], temperature=1.0, top_p=top_p, steps=3)
        assert torch.equal(alone(ids[:1], scores[k : k + 1])[0], first[k])
        assert torch.equal(alone(ids[:1], scores[k : k + 1])[0], second[k])


def test_impossible_tokens_are_never_drawn() -> None:
    assert set(drawn([-torch.inf, 0.0, -torch.inf], list(range(50)))) == {1}
