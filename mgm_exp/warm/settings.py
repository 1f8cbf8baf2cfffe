"""The keys of ``hydra.launcher`` with ``hydra/launcher=warm``."""

from __future__ import annotations

from dataclasses import dataclass

from mgm_exp.local import LocalConfig

TARGET = "hydra_plugins.mgm_exp_plugins.warm_launcher.MgmWarmLauncher"


@dataclass
class WarmConfig(LocalConfig):
    """Those of ``hydra/launcher=local``, and what a worker may hold on to."""

    _target_: str = TARGET
    # GiB that a worker may hold after a trial beyond what it began with and what it keeps on purpose (host memory and
    # GPU memory are looked at one by one). One that holds more is replaced by a new one, and that is said. The
    # libraries alone are some 0.6 GiB. null: no limit.
    max_growth_gb: float | None = 2.0
