"""What every test shares: no network, no secrets of the developer's machine, and Hydra set up once."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import settings

# How long an example takes tells how busy the machine is, not whether it is right.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")

# torch and its friends fill memory with objects that stay: looking through them again and again takes a tenth of a run.
gc.set_threshold(20_000, 20, 50)
# Last bits depend on the number of threads: the same here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", WANDB_SILENT="true")
for name in ("WANDB_API_KEY", "HF_TOKEN", "OPENAI_API_KEY", "HYDRA_FULL_ERROR"):
    os.environ.pop(name, None)


@pytest.fixture(scope="session")
def _hydra() -> Iterator[Any]:
    from mgm_exp.compose import session

    with session() as hydra:
        yield hydra


@pytest.fixture
def compose_tree(_hydra: Any) -> Callable[..., Any]:
    """Overrides -> the composed tree, Hydra's node in it."""
    from mgm_exp.compose import compose_tree

    return lambda *overrides, is_sweep=False: compose_tree(_hydra, list(overrides), is_sweep=is_sweep)


@pytest.fixture
def compose(compose_tree: Callable[..., Any]) -> Callable[..., Any]:
    """Overrides -> the typed and checked configuration, as ``python -m mgm_exp OVERRIDES`` would run with."""
    from mgm_exp.compose import checked

    return lambda *overrides: checked(compose_tree(*overrides), list(overrides))


@pytest.fixture(scope="session")
def hostile_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A real run of a few steps on data whose texts would run in a page, in an environment full of keys."""
    from recorded_run import train_a_little

    return train_a_little(tmp_path_factory.mktemp("recorded"))
