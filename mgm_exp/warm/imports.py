"""What every run imports, imported once before a worker's first: a thousand modules of torch and transformers.

They make some 400,000 objects that stay. Python's collector would look through all of them again and again while they
are made, and once more after the runs: a sixth of the time that they take. So it looks seldom while they are imported,
and never at them afterwards.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator
from contextlib import contextmanager

# What a run of any model and adapter loads; what only some load (PEFT, a tracker), they load themselves.
FOR_EVERY_RUN = (
    "mgm_exp.experiment",
    "mgm_exp.model.processor",
    "mgm_exp.train.loop",
    "mgm_exp.train.feature_pass",
    "mgm_exp.evaluate.examiner",
)
# New objects between two looks of the collector.
_SELDOM = 200_000


def load() -> None:
    """Imports them."""
    for name in FOR_EVERY_RUN:
        importlib.import_module(name)


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Around imports: what they make stays."""
    before = gc.get_threshold()
    gc.set_threshold(_SELDOM, *before[1:])
    try:
        yield
        gc.freeze()
    finally:
        gc.set_threshold(*before)
