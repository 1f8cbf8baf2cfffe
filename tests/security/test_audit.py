"""Versions with a known weakness are neither declared nor pinned, and the check would see them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from packaging.specifiers import SpecifierSet

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "audit.py"


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_nothing_declared_pinned_or_installed_has_a_known_weakness(audit: ModuleType) -> None:
    names = {requirement.name for requirement in audit.declared((SCRIPT.parents[1] / "pyproject.toml").read_text())}
    assert {"torch", "pillow", "ray", "setuptools"} <= names and len(audit.advisories()) > 10
    assert list(audit.findings()) == []


@pytest.mark.parametrize(
    ("declared", "vulnerable", "allowed"),
    [
        (">=12", "<10.3", None),
        (">=9", "<10.3", "9"),
        ("", "<10.3", "0"),
        (">=11", ">=11.2,<11.3", "11.2"),
        (">=11.3,<12", ">=11.2,<11.3", None),
        ("==1.6.1", "<2", "1.6.1"),
        ("<2", ">=1,<1.5", "1"),
    ],
)
def test_a_range_that_lets_a_weakness_in_is_seen(
    declared: str, vulnerable: str, allowed: str | None, audit: ModuleType
) -> None:
    found = audit.allows(SpecifierSet(declared), SpecifierSet(vulnerable))
    assert (None if found is None else str(found)) == allowed
