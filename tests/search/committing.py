"""Not a test: a whole search in the folder that is given, and what came of it."""

from __future__ import annotations

import json
from pathlib import Path

import sqlalchemy.dialects.sqlite  # noqa: F401 (all that a search loads, before it is traced)

from tests.search.campaign_scenario import search, summary
from tests.system_calls import say

TRIALS = 3


def with_journal(folder: Path) -> None:
    _search(folder, None)


def with_sqlite(folder: Path) -> None:
    _search(folder, "sqlite")


def _search(folder: Path, storage: str | None) -> None:
    say("result " + json.dumps(summary(search(folder, TRIALS, storage))))
