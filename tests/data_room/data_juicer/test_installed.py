"""Whether Data-Juicer is there."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest

from mgm_exp.data.data_juicer import installed, require_data_juicer
from mgm_exp.errors import MissingDependencyError


def test_the_installed_one_is_named() -> None:
    assert require_data_juicer() == "data-juicer 1.6.1"


def test_without_it_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_version(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(installed, "version", no_version)
    with pytest.raises(MissingDependencyError) as error:
        require_data_juicer()
    assert "pip install py-data-juicer==1.6.1 aiohttp ray" in str(error.value)
    assert "data.recipe.engine=builtin" in str(error.value)


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "version", lambda package: "1.4.3")
    with pytest.raises(MissingDependencyError, match=r"Data-Juicer 1\.4\.3 is installed"):
        require_data_juicer()


def test_what_it_needs_without_saying_so_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "find_spec", lambda name: None if name == "aiohttp" else object())
    with pytest.raises(MissingDependencyError, match=r"Data-Juicer needs aiohttp, which it does not declare"):
        require_data_juicer()
