"""What a composed configuration may make Hydra do: checked before Hydra acts on it.

Hydra calls classes that a configuration names (launcher, sweeper, callbacks), hands logging a dictionary that can name
any factory, sets environment variables and writes where it is told. Overrides, presets, experiment and sweep files all
end in one tree, so that tree is what is looked at: what it names must be of the lists here, whoever put it there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from mgm_exp.config import NAME
from mgm_exp.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

# Keys with which a configuration could name any class or function to be called.
CALLS = frozenset({"_target_", "_args_", "_partial_", "()", "class", "factory"})
# Keys of Hydra that act on more than this run, or before its tree can be looked at.
NOT_FOR_ANYBODY = re.compile(r"hydra[./](?:callbacks|searchpath|job\.env_set|job\.env_copy)(?![\w-])")

_TARGETS = {
    "hydra.launcher._target_": re.compile(
        r"hydra_plugins\.mgm_exp_plugins\.\w+\.Mgm\w+|hydra\._internal\.core_plugins\.basic_launcher\.BasicLauncher"
    ),
    "hydra.sweeper._target_": re.compile(
        r"hydra_plugins\.mgm_exp_plugins\.\w+\.Mgm\w+|hydra\._internal\.core_plugins\.basic_sweeper\.BasicSweeper"
    ),
}
# What Hydra's own presets of its logging name.
_LOGGING = re.compile(r"hydra\.(?:job|hydra)_logging\.")
_LOGGING_CALLS = {
    "class": {"logging.StreamHandler", "logging.NullHandler", "logging.FileHandler"},
    "()": {"colorlog.ColoredFormatter"},
}
_LOG_FILE = "${hydra.runtime.output_dir}/${hydra.job.name}.log"
_STREAMS = {"ext://sys.stdout", "ext://sys.stderr"}
_SEARCHPATH = ["mgm-sweeps://"]

_RESOLVER = re.compile(r"\$\{\s*([A-Za-z_][\w.]*)\s*:")
_RESOLVERS = frozenset(
    "oc.env oc.select oc.decode oc.create oc.deprecated oc.dict.keys oc.dict.values now hydra python_version "
    "mgm_times mgm_choose".split()
)
_ENVIRONMENT = re.compile(r"oc\.env\s*:\s*(?P<name>[^,}]*)")


def refuse_foreign(tree: DictConfig) -> None:
    """Refuses a composed tree that would call, import, write or reveal what this project did not name.

    Raises:
        ConfigError: naming the key, what is allowed, and what to do; never the value of a secret.
    """
    from omegaconf import OmegaConf

    from mgm_exp.record.secrets import secret_values

    content = OmegaConf.to_container(tree, resolve=False, throw_on_missing=False)
    assert isinstance(content, dict)
    hydra = content.get("hydra") or {}
    if hydra.get("callbacks"):
        raise ConfigError("hydra.callbacks: no class or function can be named to be called.", advice=_BY_NAME)
    if list(hydra.get("searchpath") or []) != _SEARCHPATH:
        raise ConfigError("hydra.searchpath is the package's own.", advice="Add presets with --config-dir DIR.")
    job = hydra.get("job") or {}
    if job.get("env_set"):
        raise ConfigError("hydra.job.env_set: a configuration sets no environment variables; set them in the shell.")
    _refuse_folder(hydra, job)
    secrets = secret_values()
    for key, value in _leaves(content):
        _refuse_call(key, value)
        if isinstance(value, str):
            _refuse_text(key, value, secrets)


@lru_cache(maxsize=4096)
def holds_secret(text: str, secrets: tuple[str, ...]) -> bool:
    """Whether a text holds one of these values, or what looks like a secret; a sweep's cells have most texts in common.

    Args:
        secrets: What :func:`mgm_exp.record.secrets.secret_values` gave.
    """
    from mgm_exp.record.secrets import redact_text

    return redact_text(text, secrets) != text


_BY_NAME = "Launchers and sweepers are chosen by name: hydra/launcher=..., hydra/sweeper=..."


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for place, inner in enumerate(value):
            yield from _leaves(inner, f"{key}[{place}]")
    else:
        yield key, value


def _refuse_call(key: str, value: Any) -> None:
    name = re.sub(r"(?:\[\d+\])+$", "", key).rpartition(".")[2]
    if name not in CALLS or value is None:
        return
    if key in _TARGETS:
        if _TARGETS[key].fullmatch(str(value)):
            return
        allowed = f"a class of this package: {_BY_NAME}"
    elif _LOGGING.match(key) and name in _LOGGING_CALLS:
        if str(value) in _LOGGING_CALLS[name]:
            return
        allowed = ", ".join(sorted(_LOGGING_CALLS[name]))
    else:
        allowed = "none: a configuration names no classes or functions to call"
    raise ConfigError(f"{key}={str(value)[:100]!r}: allowed is {allowed}.")


def _refuse_folder(hydra: dict[str, Any], job: dict[str, Any]) -> None:
    """What would lead out of the run's folder (``hydra.run.dir``, ``hydra.sweep.dir`` are looked at when resolved)."""
    subdir = str((hydra.get("sweep") or {}).get("subdir"))
    if subdir != "${hydra.job.num}" and not all(NAME.fullmatch(part) for part in subdir.split("/")):
        raise ConfigError(f"hydra.sweep.subdir={subdir!r} must be folder names with slashes between them, such as 3.")
    name = job.get("name")
    if name is not None and not NAME.fullmatch(str(name)):
        raise ConfigError(f"hydra.job.name={name!r} must be a plain name: it may become the name of a file.")


def _refuse_text(key: str, text: str, secrets: tuple[str, ...]) -> None:
    if key.startswith(("hydra.overrides.", "hydra.help.", "hydra.hydra_help.")):
        return  # overrides were looked at as such; help is shown, not acted on
    if _LOGGING.match(key):
        if text.startswith("ext://") and text not in _STREAMS:
            raise ConfigError(f"{key}={text[:100]!r}: allowed are {', '.join(sorted(_STREAMS))}.")
        if key.rpartition(".")[2] == "filename" and text != _LOG_FILE:
            raise ConfigError(f"{key}={text[:100]!r}: a log file lies in the run's folder ({_LOG_FILE}).")
    for resolver in _RESOLVER.findall(text):
        if resolver not in _RESOLVERS:
            raise ConfigError(
                f"{key} asks the resolver {resolver!r}; allowed are {', '.join(sorted(_RESOLVERS))}.",
                advice="Write the value itself.",
            )
    _refuse_secret(key, text, secrets)


def _refuse_secret(key: str, text: str, secrets: tuple[str, ...]) -> None:
    from mgm_exp.record.secrets import is_secret_name, is_secret_variable, secret_advice

    for name in _ENVIRONMENT.findall(text):
        plain = name.strip().strip("'\"")
        if not re.fullmatch(r"[A-Za-z_]\w*", plain) or is_secret_variable(plain):
            raise ConfigError(
                f"{key} reads the environment variable {plain[:60]!r}, which seems to hold a secret: it would be "
                "written to the run folder.",
                advice="Secrets stay in the environment (WANDB_API_KEY, HF_TOKEN); who needs them reads them there.",
            )
    last = re.sub(r"(?:\[\d+\])+$", "", key).rpartition(".")[2]
    if (text and is_secret_name(last)) or holds_secret(text, secrets):
        raise ConfigError(
            f"{key} seems to hold a secret, and configurations are written to the run folder in clear text.",
            advice=secret_advice(key),
        )
