"""Hydra's config loader, for as long as one command lasts: each file is read once, each choice of files merged once.

A sweep composes every cell twice before it runs, and its cells differ in a few values; what takes the time is reading
YAML, working out from the defaults lists which files are chosen, and merging them into the typed schema. Which files
some choices lead to is kept, and so is what was merged, which is copied for the next cell, to which Hydra then applies
the overrides of values as ever. It is kept pickled, in this process's memory: a tree is read back in a fifth of the
time that a deep copy takes.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository, IConfigRepository
from hydra._internal.defaults_list import DefaultsList, Overrides, create_defaults_list
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig

# Merged trees that are kept: choices of files, not cells.
_KEPT = 32
# Overrides that are kept as they were parsed: a cell has some dozens, most of them those of all cells.
_KEPT_TEXTS = 1024
_PARSED: dict[tuple[str, str], Any] = {}
# What loaders of this process share, where they do: files, merged trees, and lists of files.
_SHARED: list[tuple[dict[Any, dict[str, Any]], dict[Any, bytes], dict[str, DefaultsList]]] = []


def keep_files() -> None:
    """From now on, all loaders of this process share what they read: a worker composes one run after another."""
    if not _SHARED:
        _SHARED.append(({}, {}, {}))


class RememberingParser(OverridesParser):
    """Hydra's parser of overrides, which takes milliseconds for each: a text that was parsed is not parsed again."""

    def parse_rule(self, s: str, rule_name: str) -> Any:
        parsed = _PARSED.get((s, rule_name))
        if parsed is None:
            parsed = _PARSED[s, rule_name] = super().parse_rule(s, rule_name)
            while len(_PARSED) > _KEPT_TEXTS:
                del _PARSED[next(iter(_PARSED))]
        return copy.deepcopy(parsed)  # a caller may note its loader in it, and gets values that nobody else has


class _Sources(ConfigRepository):
    """Hydra's places of files. Whoever copies it lists other places in it: what is registered in them stays shared."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Sources:
        return copy.copy(self)


class _Files(CachingConfigRepository):
    """Files as they were read, and the lists of files that choices led to (by what was chosen; see below)."""

    def __init__(self, delegate: IConfigRepository, listed: dict[str, DefaultsList]) -> None:
        super().__init__(delegate)
        self.listed = listed


def _listed(
    repo: IConfigRepository,
    config_name: str | None,
    overrides_list: list[Override],
    prepend_hydra: bool,
    skip_missing: bool,
) -> DefaultsList:
    """Hydra's ``create_defaults_list``; a choice of files that a :class:`_Files` knows is not worked out again.

    The list depends on the files and on overrides of groups, not on those of values, which go with it as they are.
    """
    if not isinstance(repo, _Files):
        return create_defaults_list(repo, config_name, overrides_list, prepend_hydra, skip_missing)
    given = Overrides(repo, overrides_list)
    chosen = (given.override_choices, given.append_group_defaults, given.deletions)
    key = repr((_places(repo), config_name, prepend_hydra, skip_missing, chosen))
    if key not in repo.listed:
        repo.listed[key] = create_defaults_list(repo, config_name, overrides_list, prepend_hydra, skip_missing)
        while len(repo.listed) > _KEPT:
            del repo.listed[next(iter(repo.listed))]
    return replace(repo.listed[key], config_overrides=given.config_overrides)


# Hydra's loader has no method for it
config_loader_impl.create_defaults_list = _listed


class RememberingLoader(ConfigLoaderImpl):
    """See the module; files that change while it lives are not read again."""

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        super().__init__(config_search_path)
        self.repository = _Sources(config_search_path)
        self._files: dict[Any, dict[str, Any]]
        self._merged: dict[Any, bytes]
        self._lists: dict[str, DefaultsList]
        self._composed: tuple[list[str], DictConfig] | None = None
        self._files, self._merged, self._lists = _SHARED[0] if _SHARED else ({}, {}, {})

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        """As Hydra's; what :meth:`hand_out` was given is not composed again."""
        composed, self._composed = self._composed, None
        if composed is not None and composed[0] == overrides and run_mode is RunMode.RUN:
            return composed[1]
        return super().load_configuration(config_name, overrides, run_mode, from_shell, validate_sweep_overrides)

    def hand_out(self, overrides: list[str], tree: DictConfig) -> None:
        """A tree that was composed to be checked is the next one that is loaded, to be run, with these overrides."""
        self._composed = (overrides, tree)

    def _parse_overrides_and_create_caching_repo(
        self, config_name: str | None, overrides: list[str]
    ) -> tuple[list[Any], CachingConfigRepository]:
        parsed = RememberingParser.create().parse_overrides(overrides)
        repository = _Files(self.repository, self._lists)
        repository.cache = self._files.setdefault(_places(repository), repository.cache)
        self._process_config_searchpath(config_name, parsed, repository)
        repository.cache = self._files.setdefault(_places(repository), repository.cache)
        return parsed, repository

    def _compose_config_from_defaults_list(
        self, defaults: Sequence[ResultDefault], repo: IConfigRepository
    ) -> DictConfig:
        assert isinstance(repo, CachingConfigRepository)
        chosen = [(default.config_path, default.package, default.primary, default.is_self) for default in defaults]
        key = (_places(repo), *chosen)
        if key not in self._merged:
            # Merging takes the nodes of what it reads into the tree: those that are kept must stay out of it.
            own, files = copy.copy(repo), {f"config_path={default.config_path}" for default in defaults}
            own.cache = copy.deepcopy({name: found for name, found in repo.cache.items() if name in files})
            merged = super()._compose_config_from_defaults_list(defaults=list(defaults), repo=own)
            self._merged[key] = pickle.dumps(merged, pickle.HIGHEST_PROTOCOL)
            while len(self._merged) > _KEPT:
                del self._merged[next(iter(self._merged))]
        tree: DictConfig = pickle.loads(self._merged[key])  # noqa: S301 - written above, by this process
        return tree


def _places(repository: CachingConfigRepository) -> tuple[tuple[str, str], ...]:
    return tuple((source.provider, source.path) for source in repository.get_sources())
