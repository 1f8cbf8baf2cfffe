"""What a worker imports before its first run, and its collector meanwhile."""

from __future__ import annotations

import gc
from importlib.util import find_spec

import pytest

from mgm_exp.warm.imports import FOR_EVERY_RUN, seldom_collected


def test_the_collector_looks_seldom_meanwhile_and_never_again_at_what_was_imported() -> None:
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    try:
        with seldom_collected():
            assert gc.get_threshold()[0] > before[0]
            stays: list[list[int]] = [[] for _ in range(100)]
        assert gc.get_threshold() == before
        assert gc.get_freeze_count() >= frozen + len(stays)
    finally:
        gc.unfreeze()


def test_an_import_that_fails_leaves_the_collector_as_it_was() -> None:
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    with pytest.raises(ImportError), seldom_collected():
        raise ImportError
    assert (gc.get_threshold(), gc.get_freeze_count()) == (before, frozen)


def test_what_every_run_imports_is_there() -> None:
    assert all(find_spec(name) for name in FOR_EVERY_RUN)
