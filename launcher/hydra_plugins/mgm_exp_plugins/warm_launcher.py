"""The launcher ``warm``, the default: trials on this machine, one after another in worker processes that stay.

    python -m mgm_exp -m adapter=lora_r8,lora_r16 seed=0,1

Here the keys of ``hydra.launcher`` are taken; :mod:`mgm_exp.warm` does the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher

if TYPE_CHECKING:
    from mgm_exp.config import ExperimentConfig
    from mgm_exp.slots import Slots


class MgmWarmLauncher(BasicLauncher):
    """See the module; the arguments are the keys of :class:`mgm_exp.warm.settings.WarmConfig`.

    What it inherits runs a job in this process: for a task that is a function of this process and no program.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings

    def make_slots(self, config: ExperimentConfig, program: Sequence[str]) -> Slots:
        """Places for the trials of a sweep; see :func:`mgm_exp.warm.slots.warm_slots`."""
        from mgm_exp.warm.slots import settings_of, warm_slots

        return warm_slots(settings_of(self.settings), config, program)
