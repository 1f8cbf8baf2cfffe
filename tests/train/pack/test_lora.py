"""Whose the rows of a pass are."""

from __future__ import annotations

import pytest
import torch

from mgm_exp.model.padding_free import Padding
from mgm_exp.train.pack.lora import Rows


@pytest.mark.parametrize("at_end", [False, True])
def test_each_trials_learnt_positions_are_found_in_rows_that_others_made_longer(at_end: bool) -> None:
    lengths, places = (3, 5), ([1, 2, 5], [9])
    rows = Rows(trials=(0, 1), lengths=lengths, samples=2, at_end=at_end)
    own = [torch.arange(2.0 * length).reshape(2, length, 1) + 100 * (trial + 1) for trial, length in enumerate(lengths)]
    rows.learnt = [Padding(torch.tensor(found), (2, length)) for found, length in zip(places, lengths, strict=True)]
    together = torch.cat([rows.widened(x, max(lengths)) for x in own])
    read = together.flatten(0, 1)[rows.read(max(lengths))][..., 0]
    assert read.tolist() == [[101, 102, 105], [209, 200, 200]]


def test_a_trial_that_learns_nothing_in_a_pass_reads_nothing_of_others() -> None:
    rows = Rows(trials=(0, 1), lengths=(2, 2), samples=1)
    rows.learnt = [Padding(torch.tensor([1]), (1, 2)), Padding(torch.tensor([], dtype=torch.int64), (1, 2))]
    assert rows.read(2).tolist() == [[1], [2]]
