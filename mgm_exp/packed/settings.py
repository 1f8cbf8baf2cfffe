"""The keys of ``hydra.launcher`` with ``hydra/launcher=packed``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mgm_exp.errors import ConfigError

TARGET = "hydra_plugins.mgm_exp_plugins.packed_launcher.MgmPackedLauncher"
# Trials of a pack where nothing says how many; more share a pass only as far as memory goes.
USUAL_TRIALS = 8
MOST_TRIALS = 64


@dataclass
class PackedConfig:
    """See the module."""

    _target_: str = TARGET
    # Trials of one pack. More share start and base, and keep a GPU busy with small micro-batches; each takes 16 bytes
    # of memory a trained parameter, and its turn in evaluation. null: as sweep.slots says, else 8. Passes are taken
    # together by as many trials as the predicted memory allows.
    trials: int | None = None
    # Packs at the same time, a process each. null: one for each GPU; without GPUs one.
    packs: int | None = None


def settings_of(launcher: Mapping[str, Any]) -> PackedConfig:
    """The checked settings of a composed ``hydra.launcher`` node (or of a launcher's arguments).

    Raises:
        ConfigError: What was given, what is allowed.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        merged = OmegaConf.merge(OmegaConf.structured(PackedConfig), OmegaConf.create(dict(launcher)))
        settings = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"hydra.launcher: {str(error).splitlines()[0]}.", advice="See docs/launchers.md.") from error
    assert isinstance(settings, PackedConfig)
    if settings.trials is not None and not 1 <= settings.trials <= MOST_TRIALS:
        raise ConfigError(f"hydra.launcher.trials={settings.trials} must be 1 to {MOST_TRIALS}, or null.")
    if settings.packs is not None and settings.packs < 1:
        raise ConfigError(f"hydra.launcher.packs={settings.packs} must be 1 or more, or null.")
    return settings
