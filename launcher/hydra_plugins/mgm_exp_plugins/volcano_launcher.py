"""The launcher ``volcano``: ``hydra/launcher=volcano`` makes the trials of a sweep Volcano jobs in Kubernetes.

    mgm-exp launch --dry-run hydra/launcher=volcano ...          prints the manifests
    python -m mgm_exp -m hydra/launcher=volcano ...              submits them through kubectl

Here the keys of ``hydra.launcher`` are taken; :mod:`mgm_exp.volcano_slots` does the work for both sweepers.
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


class MgmVolcanoLauncher(Launcher):
    """See the module; the arguments are the keys of :class:`mgm_exp.volcano.VolcanoConfig`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Nothing is kept: the sweepers of this package ask for slots, and start trials by their command line."""

    def make_slots(self, config: ExperimentConfig, program: Sequence[str]) -> Slots:
        """Places for the trials of a sweep; see :func:`mgm_exp.volcano_slots.slots_of`."""
        from mgm_exp.volcano import settings_of
        from mgm_exp.volcano_slots import slots_of

        return slots_of(settings_of(self.settings), config, program)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Hydra's own way, in which the sweeper waits for a whole batch.

        Raises:
            ConfigError: always: a sweeper that asks for this cannot pick a sweep up again.
        """
        from mgm_exp.errors import ConfigError

        raise ConfigError(
            "hydra/launcher=volcano works with the sweepers of this package.",
            advice="Take hydra/sweeper=mgm_grid or mgm_optuna.",
        )
