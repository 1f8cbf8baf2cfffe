"""The launcher ``slurm``: ``hydra/launcher=slurm`` makes the trials of a sweep Slurm jobs. See docs/slurm.md.

    python -m mgm_exp -m hydra/launcher=slurm adapter=lora_r8,lora_r16 hydra.launcher.partition=gpu

Here the keys of ``hydra.launcher`` are taken; :mod:`mgm_exp.slurm_slots` does the work for both sweepers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra.plugins.launcher import Launcher

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn
    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig

    from mgm_exp.config import ExperimentConfig
    from mgm_exp.slots import Slots


class MgmSlurmLauncher(Launcher):
    """See the module; the arguments are the keys of :class:`mgm_exp.slurm.SlurmConfig`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings
        self.is_search = False

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.is_search = str(config.hydra.sweeper._target_).endswith(".MgmOptunaSweeper")

    def make_slots(self, config: ExperimentConfig, program: Sequence[str]) -> Slots:
        """Places for the trials of a sweep; see :func:`mgm_exp.slurm_slots.slots_of`."""
        from mgm_exp.slurm import settings_of
        from mgm_exp.slurm_slots import slots_of

        return slots_of(settings_of(self.settings), config, program, is_grid=not self.is_search)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Hydra's own way, in which the sweeper waits for a whole batch.

        Raises:
            ConfigError: always: a sweeper that asks for this cannot pick a sweep up again.
        """
        from mgm_exp.errors import ConfigError

        raise ConfigError(
            "hydra/launcher=slurm works with the sweepers of this package.",
            advice="Take hydra/sweeper=mgm_grid or mgm_optuna.",
        )
