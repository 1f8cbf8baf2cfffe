"""Says in one paragraph why a configuration does not compose: the key, what is allowed, what was perhaps meant.

Hydra and OmegaConf raise a dozen kinds of errors, with search paths and class names in them. :func:`explain` turns each
into a :class:`~mgm_exp.errors.ConfigError` that names the override as it was typed and what may stand there.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from mgm_exp.bootstrap import CONF, SWEEPS
from mgm_exp.config import ExperimentConfig
from mgm_exp.errors import ConfigError

HELP = "`python -m mgm_exp --help` lists the groups and the most used keys, docs/configuration.md all of them."


@cache
def known_keys() -> dict[str, Any]:
    """Every key of the schema with its type, sections included: ``train.align.lr`` -> ``float``."""
    return _keys_of(ExperimentConfig, "")


def _keys_of(section: type, prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    hints = get_type_hints(section)
    for field in fields(section):
        found[prefix + field.name] = hints[field.name]
        if is_dataclass(hints[field.name]):
            found.update(_keys_of(hints[field.name], f"{prefix}{field.name}."))
    return found


@cache
def groups() -> dict[str, tuple[str, ...]]:
    """The groups of ``conf/`` and ``sweeps/`` with their choices, Hydra's own left out."""
    folders = sorted(path for path in CONF.iterdir() if path.is_dir() and path.name not in ("hydra", "__pycache__"))
    return {folder.name: tuple(sorted(file.stem for file in folder.glob("*.yaml"))) for folder in [*folders, SWEEPS]}


def in_words(kind: Any) -> str:
    """What a value of this type looks like on the command line."""
    if get_origin(kind) in (Union, types.UnionType):
        inner = [part for part in get_args(kind) if part is not type(None)]
        return f"{in_words(inner[0])}, or null"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(member.name for member in kind)
    if is_dataclass(kind) and isinstance(kind, type):
        return "a section with the keys " + ", ".join(field.name for field in fields(kind))
    if get_origin(kind) is list:
        return "a list in brackets, such as [a,b]"
    names = {int: "a whole number", float: "a number, such as 1e-4", bool: "true or false", str: "text"}
    return names.get(kind, str(kind))


def explain(error: Exception, overrides: Sequence[str] = ()) -> ConfigError | None:
    """The error as a user can read it; None where it is not about the configuration.

    Args:
        error: What composing or typing a configuration raised.
        overrides: The overrides as they were typed.
    """
    if isinstance(error, ConfigError):
        return error
    if isinstance(error, MissingConfigException):
        return _unknown_choice(error)
    if isinstance(error, OverrideParseException):
        return _unreadable(error)
    if isinstance(error, ValueError) and "Config group override must be" in str(error):
        return _no_name(overrides)
    root = error
    while not isinstance(root, OmegaConfBaseException) and isinstance(root.__cause__, Exception):
        root = root.__cause__
    if isinstance(root, OmegaConfBaseException):
        return _wrong_value(root, overrides)
    if isinstance(error, HydraException):
        return _composition(error, overrides)
    return None


def _unknown_launcher_key(key: str, given: str) -> ConfigError:
    from mgm_exp.local import LocalConfig
    from mgm_exp.slurm import SlurmConfig
    from mgm_exp.volcano import VolcanoConfig
    from mgm_exp.warm.settings import WarmConfig

    name = key.split(".")[2]
    sections = {"local": LocalConfig, "slurm": SlurmConfig, "volcano": VolcanoConfig, "warm": WarmConfig}
    names = {
        launcher: [field.name for field in fields(section) if field.name != "_target_"]
        for launcher, section in sections.items()
    }
    near = difflib.get_close_matches(name, sorted({key for keys in names.values() for key in keys}), n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    there = "; ".join(f"hydra/launcher={launcher} has {', '.join(keys)}" for launcher, keys in names.items())
    return ConfigError(f"{given}: the launcher has no key {name!r}.{hint}", advice=f"{there}; basic has none.")


def unknown_key(key: str, override: str = "") -> ConfigError:
    """A key that the schema does not have."""
    given = override or key
    if key.startswith("hydra.launcher."):
        return _unknown_launcher_key(key, given)
    if key.split(".")[0] == "hydra":
        return ConfigError(f"{given}: Hydra has no key {key}.", advice="`--hydra-help` says more.")
    parent, _, name = key.rpartition(".")
    while parent and not is_dataclass(known_keys().get(parent)):
        parent, _, name = parent.rpartition(".")
    siblings = [field.name for field in fields(known_keys()[parent] if parent else ExperimentConfig)]
    near = _nearest_keys(key, parent, name, siblings)
    where = f"in {parent}" if parent else "at the top"
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return ConfigError(f"{given}: there is no key {key!r}.{hint} Allowed {where}: {', '.join(siblings)}.", advice=HELP)


def _nearest_keys(key: str, parent: str, name: str, siblings: list[str]) -> list[str]:
    """At most three: misspelt beside it, the same name elsewhere, misspelt as a whole."""
    beside = difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    near = [f"{parent}.{match}" if parent else match for match in beside]
    near += [known for known in known_keys() if known.rpartition(".")[2] == name]
    near += difflib.get_close_matches(key, [*known_keys(), *groups()], n=1, cutoff=0.75)
    return list(dict.fromkeys(near))[:3]


def unknown_choice(group: str, choice: str, allowed: Sequence[str]) -> ConfigError:
    """A choice that a group does not have."""
    near = difflib.get_close_matches(choice, allowed, n=1, cutoff=0.5)
    hint = f" Did you mean {group}={near[0]}?" if near else ""
    return ConfigError(
        f"{group}={choice}: {choice!r} is not a choice of {group}; allowed are {', '.join(allowed) or 'none'}.{hint}"
    )


def _unknown_choice(error: MissingConfigException) -> ConfigError:
    group, _, choice = (error.missing_cfg_file or "").rpartition("/")
    if not group:
        return ConfigError(f"There is no configuration file {error.missing_cfg_file!r}.", advice=HELP)
    # A group's file may be a parent folder's: what is allowed is what can be typed.
    return unknown_choice(group, choice, list(error.options or groups().get(group, ())))


def _unreadable(error: OverrideParseException) -> ConfigError:
    given = str(getattr(error, "override", "") or "")
    if "=" not in given and not given.startswith("~"):
        return ConfigError(
            f"{given!r} is not of the form KEY=VALUE (adapter=lora_r16, train.lr=1e-4).",
            advice="Verbs such as status and report belong to mgm-exp: `mgm-exp --help`.",
        )
    return ConfigError(
        f"{given!r} cannot be read: {_first_sentence(error)}.",
        advice="Put values with commas, brackets, braces, = or spaces in two pairs of quotes: KEY='\"VALUE\"'.",
    )


def _first_sentence(error: Exception) -> str:
    context = error.__cause__ or error.__context__ or error
    return str(context).splitlines()[0].strip().rstrip(".")


def _no_name(overrides: Sequence[str]) -> ConfigError:
    for override in overrides:
        key, _, value = override.partition("=")
        is_name = value.strip().isidentifier() and value not in ("null", "true", "false")
        if key.lstrip("+") in groups() and not is_name:
            return unknown_choice(key.lstrip("+"), value, groups()[key.lstrip("+")])
    return ConfigError("A group was given something else than the name of a choice.", advice=HELP)


def _wrong_value(error: OmegaConfBaseException, overrides: Sequence[str]) -> ConfigError:
    key = str(getattr(error, "full_key", None) or "")
    given = _as_typed(key, overrides)
    is_of_a_key = isinstance(error, (ConfigAttributeError, ConfigKeyError))
    if is_of_a_key and not isinstance(error, InterpolationResolutionError):
        return unknown_key(key, given)
    said = str(getattr(error, "msg", None) or error).splitlines()[0].strip().rstrip(".")
    if isinstance(error, MissingMandatoryValue):
        return ConfigError(f"{key} has no value and needs one.", advice=HELP)
    if isinstance(error, ValidationError) and key in known_keys():
        return ConfigError(f"{given or key}: {key} takes {in_words(known_keys()[key])}. ({said}.)")
    return ConfigError(f"{given or key}: {said}.", advice=HELP)


def _as_typed(key: str, overrides: Sequence[str]) -> str:
    for override in reversed(overrides):
        name = override.partition("=")[0].lstrip("+~")
        if name == key or key.startswith(name + ".") or name.startswith(key + "."):
            return override
    return ""


def _composition(error: HydraException, overrides: Sequence[str]) -> ConfigError:
    said = " ".join(str(error).split())
    for override in overrides:
        if said.startswith(f"Ambiguous value for argument '{override}'") or f"'{override}' requires --multirun" in said:
            return several_values(override)
    if said.startswith("Multiple values for "):
        group = said.removeprefix("Multiple values for ").split(".")[0]
        return ConfigError(f"+{group}=...: {group} is a group that every run has; drop the +, or give it once only.")
    return ConfigError(said, advice=HELP)


def several_values(override: str) -> ConfigError:
    """Several values for one key, in a command that is one run."""
    key, _, value = override.partition("=")
    a_list = "" if "(" in value else f"; a list is written {key}=[{value}]"
    return ConfigError(
        f"{override} gives {key} more than one value, which one run cannot have.",
        advice=f"Add -m to run a sweep over them{a_list}.",
    )
