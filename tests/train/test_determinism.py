"""``train.deterministic``: only inside of a stage, and all of it."""

from __future__ import annotations

import os

import pytest
import torch

from mgm_exp.train.determinism import CUBLAS, determinism, environment


def state() -> tuple[bool, bool, bool]:
    cudnn = torch.backends.cudnn
    return torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark


def test_kernels_are_deterministic_inside_and_as_before_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CUBLAS, raising=False)
    before = state()
    with determinism(False):
        assert state() == before and CUBLAS not in os.environ
    with pytest.raises(ZeroDivisionError), determinism(True):
        assert state() == (True, True, False) and os.environ[CUBLAS] == ":4096:8"
        raise ZeroDivisionError
    assert state() == before


def test_processes_of_a_stage_get_what_cublas_needs_before_they_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CUBLAS, ":16:8")
    assert environment(False) == {} and environment(True) == {CUBLAS: ":16:8"}, "what the user set stays"
