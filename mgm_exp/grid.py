"""The cells of a grid sweep: what is swept, in which order, and what the sweep is called.

``-m data=raw,blip2 adapter=lora_r8,lora_r16 seed=3`` has two axes and one fixed override: four cells. Their order does
not depend on the order of the arguments: what decides the early stages varies slowest, so that cells which share a
stage follow each other.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mgm_exp.bootstrap import quote_numeric_choices
from mgm_exp.errors import ConfigError
from mgm_exp.store import fingerprint

if TYPE_CHECKING:
    from omegaconf import DictConfig

MAX_CELLS = 1000
# Slowest first: another model or other data means another align stage, another adapter only another instruct stage.
_SLOWEST_FIRST = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?:experiment|debug)",
        r"model(?:\..*)?",
        r"data(?:\..*)?",
        r"seed",
        r"(?:zero|devices|device)(?:\..*)?",
        r"train(?:\.align\..*)?",
    )
)
# They say where and how a sweep runs, so that every cell must have the same.
NOT_SWEPT = re.compile(r"(?:paths|sweep|hydra|launch|trial|sweeps|device)(?:[./@].*)?")
# What a sweep's name leaves out, as a run's configuration hash does.
_NOT_HASHED = ("name", "paths", "tracker", "sweep", "plan", "monitor", "alerts", "launch", "trial", "hydra")
_LONGEST_NAME = 100


@dataclass(frozen=True)
class Axis:
    """One swept key and its values, as they are written in an override."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """One trial's configuration.

    Args:
        overrides: All that the command line gives it, ready for Hydra.
        params: What is swept, and this cell's values.
    """

    overrides: tuple[str, ...]
    params: dict[str, Any]


@dataclass(frozen=True)
class Grid:
    """The fixed overrides and the axes, slowest first."""

    fixed: tuple[str, ...]
    axes: tuple[Axis, ...]

    def __len__(self) -> int:
        return math.prod(len(axis.values) for axis in self.axes)

    def cells(self) -> Iterator[Cell]:
        """Every combination, the last axis varying fastest."""
        from mgm_exp.compose import parse

        for values in itertools.product(*(axis.values for axis in self.axes)):
            swept = quote_numeric_choices(f"{axis.key}={value}" for axis, value in zip(self.axes, values, strict=True))
            params = {override.key_or_group: _for_json(override.value()) for override in parse(swept)}
            yield Cell((*self.fixed, *swept), params)

    def early_keys(self) -> list[str]:
        """The axes that decide the early stages: cells that agree in them share these stages."""
        return [axis.key.lstrip("+") for axis in self.axes if _rank(axis.key) < len(_SLOWEST_FIRST)]

    def name(self, fixed: DictConfig, seeds: int = 1) -> str:
        """The default name of the sweep: what is swept, and a short hash of the rest of the configuration.

        Args:
            fixed: The composed tree of the fixed overrides.
            seeds: Runs of each cell: whether there are several is part of the hash, since folders then differ.
        """
        swept = "+".join(f"{plain_name(axis.key)}={','.join(map(plain_name, axis.values))}" for axis in self.axes)
        rest: dict[str, Any] = {"config": without(fixed, [axis.key for axis in self.axes])}
        if seeds > 1:
            rest["has_seeds"] = True
        if len(swept) > _LONGEST_NAME:
            rest["axes"] = [[axis.key, *axis.values] for axis in self.axes]
            swept = "+".join(plain_name(axis.key) for axis in self.axes)[:_LONGEST_NAME].rstrip(".+=,-")
        return f"{swept or 'one'}-{fingerprint(rest)[:8]}"


def parse_grid(arguments: Sequence[str], params: Mapping[str, str], config_loader: Any = None) -> Grid:
    """The grid of a command line and a sweep file.

    Args:
        arguments: Overrides as they were typed; of the same key the last one counts.
        params: ``hydra.sweeper.params`` of a sweep file; the command line wins over it.
        config_loader: Hydra's, for ``glob(...)``.

    Raises:
        ConfigError: something is swept that cannot be, or there are too many cells.
    """
    from mgm_exp.compose import parse

    overrides = [f"{key}={value}" for key, value in params.items()] + list(arguments)
    fixed: dict[str, str] = {}
    swept: dict[str, Axis] = {}
    for override in parse(overrides, config_loader):
        key = override.get_key_element()
        fixed.pop(key, None)
        swept.pop(key, None)
        if not override.is_sweep_override():
            fixed[key] = str(override.input_line)
            continue
        if not override.is_discrete_sweep():
            raise ConfigError(
                f"{override.input_line} is an interval, and a grid has points: write values (a,b,c), choice(...) or "
                "range(...), or search it with hydra/sweeper=mgm_optuna."
            )
        if NOT_SWEPT.fullmatch(key.lstrip("+")):
            raise ConfigError(f"{override.input_line}: {key} says where or how the sweep runs and has one value.")
        try:
            values = tuple(dict.fromkeys(str(value) for value in override.sweep_string_iterator()))
        except TypeError as error:  # Hydra's: glob([23]) is a list of numbers, which match nothing
            raise ConfigError(f"{override.input_line}: a pattern is text, such as glob(lora_*).") from error
        if not values:
            raise ConfigError(f"{override.input_line} has no value.", advice="Check the pattern; `--help` lists all.")
        swept[key] = Axis(key, values)
    axes = sorted(swept.values(), key=lambda axis: (_rank(axis.key), axis.key))
    grid = Grid(tuple(fixed.values()), tuple(axes))
    if len(grid) > MAX_CELLS:
        sizes = " x ".join(f"{axis.key} ({len(axis.values)})" for axis in axes)
        raise ConfigError(f"The grid {sizes} has {len(grid):,} cells; at most {MAX_CELLS:,} are run as a grid.")
    return grid


def _rank(key: str) -> int:
    name = key.lstrip("+")
    ranks = (rank for rank, pattern in enumerate(_SLOWEST_FIRST) if pattern.fullmatch(name))
    return next(ranks, len(_SLOWEST_FIRST))


def _for_json(value: Any) -> Any:
    """As ``sweep.json`` can hold it: not every number that can be typed is one in JSON (nan, 1e400)."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def plain_name(text: str) -> str:
    """A text as part of a folder name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text.strip("+'\"[] ")).strip("_") or "_"


def without(tree: DictConfig, swept: Sequence[str]) -> dict[str, Any]:
    """The configuration as far as it defines a sweep's trials, without what is swept."""
    from omegaconf import OmegaConf

    values: Any = OmegaConf.to_container(tree, resolve=False, enum_to_str=True)
    for key in (*_NOT_HASHED, "train.checkpoint", *(key.lstrip("+").partition("@")[0] for key in swept)):
        section: Any = values
        *parents, last = key.split(".")
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section.pop(last, None)
    return dict(values)
