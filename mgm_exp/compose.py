"""From overrides to a checked configuration: ``compose(["adapter=lora_r16", "train.lr=1e-4"])``.

Hydra composes the YAML of ``conf/`` over the typed schema; what does not compose is explained in one paragraph
(:mod:`mgm_exp.spelling`). Overrides are what the user typed, but some of them would run foreign code or write a secret
to disk, and those are refused before Hydra sees them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgm_exp import bootstrap
from mgm_exp.config import ExperimentConfig, typed
from mgm_exp.errors import ConfigError
from mgm_exp.hydra_limits import CALLS, NOT_FOR_ANYBODY, holds_secret, refuse_foreign

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

CONFIG_NAME = "config"


def compose(overrides: Iterable[str] = ()) -> ExperimentConfig:
    """The configuration that ``python -m mgm_exp OVERRIDES`` runs with.

    Raises:
        ConfigError: it does not compose, or its values do not go together.
    """
    given = list(overrides)
    with session() as hydra:
        return checked(compose_tree(hydra, given), given)


@contextmanager
def session(config_dir: str | None = None) -> Iterator[Hydra]:
    """Hydra with this package's configuration; another use of Hydra in this process finds its own again afterwards.

    Args:
        config_dir: A folder with more presets (``--config-dir``): its ``train/mine.yaml`` is ``train=mine``.
    """
    bootstrap.plugins()
    from hydra import initialize_config_dir
    from hydra.core.config_search_path import SearchPathQuery
    from hydra.core.global_hydra import GlobalHydra

    from mgm_exp.config_loader import RememberingLoader

    bootstrap.register()
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with bootstrap.one_version_of_hydra():
            started = initialize_config_dir(str(bootstrap.CONF), job_name="mgm_exp", version_base="1.3")
        with started, bootstrap.logging_kept():
            hydra = GlobalHydra.instance().hydra
            assert hydra is not None
            if config_dir is not None:
                folder = Path(config_dir).expanduser().resolve()
                if not folder.is_dir():
                    raise ConfigError(f"--config-dir {config_dir} is not a folder.")
                hydra.config_loader.get_search_path().prepend(
                    "command-line", f"file://{folder}", SearchPathQuery(provider="schema")
                )
            hydra.config_loader = RememberingLoader(hydra.config_loader.get_search_path())
            yield hydra
    finally:
        GlobalHydra.instance().hydra = before


def compose_tree(hydra: Hydra, overrides: Sequence[str], *, is_sweep: bool = False) -> DictConfig:
    """The composed tree with Hydra's own node in it.

    Args:
        overrides: As they were typed.
        is_sweep: Leave overrides with several values out, rather than refusing them.

    Raises:
        ConfigError: it does not compose.
    """
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf.errors import OmegaConfBaseException

    refuse_unsafe(overrides)
    try:
        tree = hydra.compose_config(
            config_name=CONFIG_NAME,
            overrides=bootstrap.quote_numeric_choices(overrides),
            run_mode=RunMode.MULTIRUN if is_sweep else RunMode.RUN,
            from_shell=False,
            validate_sweep_overrides=not is_sweep,
        )
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise explained(error, overrides) from error
    refuse_foreign(tree)
    return tree


def checked(tree: DictConfig, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """The typed and validated configuration of a composed tree.

    Raises:
        ConfigError: a value is missing, of the wrong type or out of range, or values do not go together.
    """
    from omegaconf.errors import OmegaConfBaseException

    try:
        return typed(tree)
    except OmegaConfBaseException as error:
        raise explained(error, overrides) from error


def explained(error: Exception, overrides: Sequence[str]) -> Exception:
    """The error in the user's terms, or itself where it is not about the configuration."""
    from mgm_exp.spelling import explain

    return explain(error, overrides) or error


def parse(overrides: Sequence[str], config_loader: Any = None) -> list[Override]:
    """The overrides as Hydra understands them.

    Raises:
        ConfigError: one of them is not of Hydra's grammar.
    """
    from hydra.errors import HydraException

    from mgm_exp.config_loader import RememberingParser

    parser = RememberingParser.create(config_loader=config_loader)
    try:
        return parser.parse_overrides(bootstrap.quote_numeric_choices(overrides))
    except HydraException as error:
        raise explained(error, overrides) from error


def refuse_unsafe(overrides: Sequence[str]) -> None:
    """Refuses overrides that would call what they name, or that would be kept on disk with a secret in them.

    Raises:
        ConfigError: naming the key (never the value).
    """
    from mgm_exp.record.secrets import secret_values

    secrets = secret_values()
    for text, override in zip(overrides, parse(overrides), strict=True):
        key = override.key_or_group
        _refuse_secret(text, key, secrets)
        named = {*key.split("."), *_names(override.value())}
        if NOT_FOR_ANYBODY.match(key) or not CALLS.isdisjoint(named):
            raise ConfigError(
                f"{key}: the command line cannot name classes or functions to call, places to search or variables to "
                "set (hydra.callbacks, _target_, hydra.searchpath, hydra.job.env_set, ...).",
                advice="Launchers and sweepers are chosen by name (hydra/launcher=..., hydra/sweeper=...), presets "
                "with --config-dir DIR.",
            )


def _names(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield str(name)
            yield from _names(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _names(inner)


def _refuse_secret(text: str, key: str, secrets: tuple[str, ...]) -> None:
    from mgm_exp.record.secrets import is_secret_name, secret_advice

    if is_secret_name(key) or holds_secret(text, secrets):
        raise ConfigError(
            f"{key} seems to hold a secret, and overrides are written to the run folder in clear text.",
            advice=secret_advice(key),
        )
