"""The launcher ``packed``: ``hydra/launcher=packed`` trains the trials of a sweep in one process over one base.

    python -m mgm_exp -m hydra/launcher=packed adapter.rank=4,8,16 train.lr=1e-4,3e-4

Here the keys of ``hydra.launcher`` are taken; :mod:`mgm_exp.packed` does the work.
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


class MgmPackedLauncher(Launcher):
    """See the module; the arguments are the keys of :class:`mgm_exp.packed.settings.PackedConfig`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Nothing is kept: the sweepers of this package ask for slots, and start trials by their command line."""

    def make_slots(self, config: ExperimentConfig, program: Sequence[str]) -> Slots:
        """Places for the trials of a sweep; see :func:`mgm_exp.packed.slots.packed_slots`."""
        from mgm_exp.packed.settings import settings_of
        from mgm_exp.packed.slots import packed_slots

        return packed_slots(settings_of(self.settings), config, program)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Hydra's own way, in which the sweeper waits for a whole batch.

        Raises:
            ConfigError: always: a sweeper that asks for this cannot pick a sweep up again.
        """
        from mgm_exp.errors import ConfigError

        raise ConfigError(
            "hydra/launcher=packed works with the sweepers of this package.",
            advice="Take hydra/sweeper=mgm_grid or mgm_optuna.",
        )
