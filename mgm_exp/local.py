"""Slots on this machine: what ``hydra/launcher=local`` takes, and what ``sweep.slots`` above 1 means without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from mgm_exp.errors import ConfigError
from mgm_exp.gpus import dealt, visible_gpus

if TYPE_CHECKING:
    from mgm_exp.config import ExperimentConfig
    from mgm_exp.slots import ChildProcesses

TARGET = "hydra_plugins.mgm_exp_plugins.local_launcher.MgmLocalLauncher"


@dataclass
class LocalConfig:
    """The keys of ``hydra.launcher`` with ``hydra/launcher=local``."""

    _target_: str = TARGET
    # Trials at the same time: the same as sweep.slots. null: one for each set of `devices` GPUs; without GPUs one.
    slots: int | None = None
    # Whether two slots may have the same GPU. true: more trials than GPUs, for models that are small beside the GPU's
    # memory; they slow each other down, and may run out of memory together.
    share_gpus: bool = False
    # GiB of host memory that a trial may use, all its processes together. It is looked at twice a second: a trial
    # above it is ended and counts as out of memory; a faster burst is left to the kernel. null: no limit.
    mem_gb: float | None = None


Settings = TypeVar("Settings", bound=LocalConfig)


def settings_of(launcher: Mapping[str, Any]) -> LocalConfig:
    """The checked settings of a composed ``hydra.launcher`` node (or of a launcher's arguments).

    Raises:
        ConfigError: What was given, what is allowed.
    """
    return checked_settings(LocalConfig, launcher, "docs/processes.md")


def checked_settings(kind: type[Settings], launcher: Mapping[str, Any], page: str) -> Settings:
    """As :func:`settings_of`, of a launcher that has these keys and more; ``page`` explains them."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        merged = OmegaConf.merge(OmegaConf.structured(kind), OmegaConf.create(dict(launcher)))
        settings = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"hydra.launcher: {str(error).splitlines()[0]}.", advice=f"See {page}.") from error
    assert isinstance(settings, kind)
    for key, value in vars(settings).items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and not 0 < value < float("inf"):
            raise ConfigError(f"hydra.launcher.{key}={value} must be a finite number above 0, or null.")
    return settings


def local_slots(settings: LocalConfig, config: ExperimentConfig, program: Sequence[str]) -> ChildProcesses:
    """The slots of a sweep on this machine, a process and GPUs of its own for each.

    Raises:
        ConfigError: Two numbers of slots are given, or there are too few GPUs, or a hostfile is given.
    """
    from mgm_exp.slots import ChildProcesses

    return ChildProcesses(places_of(settings, config), program, mem_gb=settings.mem_gb)


def places_of(settings: LocalConfig, config: ExperimentConfig) -> list[list[str]]:
    """The GPUs of each slot of a sweep on this machine; empty lists where there are none.

    Raises:
        ConfigError: as :func:`local_slots`.
    """
    from mgm_exp.config import Device

    if None not in (settings.slots, config.sweep.slots) and settings.slots != config.sweep.slots:
        raise ConfigError(
            f"hydra.launcher.slots={settings.slots} and sweep.slots={config.sweep.slots} mean the same; give one."
        )
    gpus = [] if config.device is Device.cpu else visible_gpus()
    slots = settings.slots or config.sweep.slots or max(1, len(gpus) // config.devices)
    if slots > 1 and config.launch.hostfile:
        raise ConfigError(
            f"{slots} slots are places on this machine, and launch.hostfile={config.launch.hostfile} gives a trial "
            "several machines.",
            advice="Give sweep.slots=1, or drop the hostfile.",
        )
    return dealt(gpus, slots, config.devices, share=settings.share_gpus)
