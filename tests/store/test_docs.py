"""The page in docs/ shows code that works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .real_processes import REPOSITORY


def test_the_example_on_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (REPOSITORY / "docs" / "store.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for expected in ("False", "True"):
        exec(compile(code, "docs/store.md", "exec"), {})
        assert capsys.readouterr().out.startswith(expected)
