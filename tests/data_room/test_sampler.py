"""Parity with indices that the official sampler gave, and what every order must hold."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mgm_exp.data.sampler import length_grouped, like_length, modality_length_grouped

from .conftest import GOLDEN

RECORDED = json.loads((GOLDEN / "sampler.json").read_text())


def test_modality_grouping_gives_the_official_indices() -> None:
    torch.manual_seed(RECORDED["torch_manual_seed"])
    generator = torch.Generator().manual_seed(RECORDED["generator_seed"])
    order = modality_length_grouped(
        RECORDED["modality_lengths"], RECORDED["batch_size"], RECORDED["world_size"], batch_generator=generator
    )
    assert order == RECORDED["modality_grouped"]


def test_length_grouping_gives_the_official_indices() -> None:
    torch.manual_seed(RECORDED["torch_manual_seed"])
    lengths = [abs(length) for length in RECORDED["modality_lengths"]]
    assert length_grouped(lengths, RECORDED["batch_size"], RECORDED["world_size"]) == RECORDED["length_grouped"]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(-50, 50).filter(bool), min_size=1, max_size=120),
    micro=st.integers(1, 4),
    n_micro=st.integers(1, 4),
    seed=st.integers(0, 5),
)
def test_every_index_comes_once_and_whole_batches_have_one_modality(
    lengths: list[int], micro: int, n_micro: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    order = modality_length_grouped(lengths, micro, n_micro, generator, generator)
    assert sorted(order) == list(range(len(lengths)))
    size = micro * n_micro
    of_each = [sum(n > 0 for n in lengths), sum(n < 0 for n in lengths)]
    if all(of_each):
        pure = sum((n - 1) // size for n in of_each)  # the last batch of each kind is mixed, as in the official code
        for start in range(0, pure * size, size):
            assert len({lengths[i] > 0 for i in order[start : start + size]}) == 1


def test_micro_batches_are_of_even_length() -> None:
    lengths = list(range(1, 65))
    order = length_grouped(lengths, 4, 4, torch.Generator().manual_seed(0))
    for start in range(0, 64, 16):
        totals = [sum(lengths[i] for i in order[at : at + 4]) for at in range(start, start + 16, 4)]
        assert max(totals) - min(totals) <= max(lengths) / 2


def test_a_length_of_zero_has_no_modality() -> None:
    with pytest.raises(ValueError, match="sample 1"):
        modality_length_grouped([3, 0, -2], 1, 1)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=300),
    size=st.integers(1, 8),
    seed=st.integers(0, 5),
)
def test_like_lengths_hold_every_sample_once_the_longest_of_a_batch_first(
    lengths: list[int], size: int, seed: int
) -> None:
    order = like_length(lengths, size, torch.Generator().manual_seed(seed))
    assert sorted(order) == list(range(len(lengths)))
    for start in range(0, len(order), size):
        batch = [lengths[i] for i in order[start : start + size]]
        assert batch == sorted(batch, reverse=True)


def test_like_lengths_pad_least_and_their_batches_come_in_random_order() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 500, (4_000,), generator=generator).tolist()

    def filled_up(order: list[int]) -> float:
        batches = [[lengths[i] for i in order[at : at + 8]] for at in range(0, len(order), 8)]
        return sum(len(batch) * max(batch) for batch in batches) / sum(lengths)

    order = like_length(lengths, 8, generator)
    assert filled_up(torch.randperm(4_000, generator=generator).tolist()) > 1.6
    assert filled_up(length_grouped(lengths, 8, 1, generator)) > 1.6, (
        "one micro-batch in a global batch: nothing to split"
    )
    assert filled_up(order) < 1.05
    longest = [lengths[order[at]] for at in range(0, len(order), 8)]
    assert longest != sorted(longest, reverse=True)
    assert order != like_length(lengths, 8, generator)
