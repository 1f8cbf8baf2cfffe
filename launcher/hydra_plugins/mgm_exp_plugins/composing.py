"""What both sweepers do alike: compose and check configurations, keep what was composed, launch in a sweep's folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hydra.plugins.sweeper import Sweeper

if TYPE_CHECKING:
    from pathlib import Path

    from hydra.core.utils import JobReturn
    from hydra.plugins.launcher import Launcher
    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig

    from mgm_exp.config import ExperimentConfig
    from mgm_exp.slots import Slots

# Composed trees that are kept: of the trials that are about to run.
_KEPT = 8


class ComposingSweeper(Sweeper):
    """See the module; a sweeper adds ``sweep``.

    Args:
        params: What a sweep file sweeps; the command line wins over it.
    """

    def __init__(self, params: dict[str, Any]) -> None:
        super().__init__()
        self.params = params
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None
        self.hydra_context: HydraContext | None = None
        self.task_function: Any = None
        self._trees: dict[tuple[str, ...], DictConfig] = {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from hydra.core.plugins import Plugins

        self.config, self.hydra_context, self.task_function = config, hydra_context, task_function
        loader: Any = _Remembering(hydra_context.config_loader, self._trees)
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=replace(hydra_context, config_loader=loader), task_function=task_function, config=config
        )

    def tree_of(self, overrides: Sequence[str]) -> DictConfig:
        """The composed tree of some overrides.

        Raises:
            ConfigError: they do not compose.
        """
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException

        from mgm_exp.compose import explained
        from mgm_exp.hydra_limits import refuse_foreign

        assert self.config is not None and self.hydra_context is not None
        key = tuple(overrides)
        if key not in self._trees:
            try:
                tree = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            except (HydraException, OmegaConfBaseException, ValueError) as error:
                raise explained(error, overrides) from error
            refuse_foreign(tree)
            self._trees[key] = tree
            while len(self._trees) > _KEPT:
                del self._trees[next(iter(self._trees))]
        return self._trees[key]

    def config_of(self, overrides: Sequence[str]) -> ExperimentConfig:
        """The checked configuration of some overrides.

        Raises:
            ConfigError: they do not compose, or their values do not go together.
        """
        from mgm_exp.compose import checked

        return checked(self.tree_of(overrides), list(overrides))

    def make_slots(self, config: ExperimentConfig) -> Slots:
        """Where trials run."""
        from mgm_exp.slots import make_slots
        from mgm_exp.sweep_folder import record_failure

        return make_slots(self.launcher, config, self.task_function.program, self._launch, record_failure)

    def write_into(self, folder: Path) -> None:
        """Trials that run in this process find their folders below the sweep's."""
        from omegaconf import read_write

        assert self.config is not None
        with read_write(self.config.hydra.sweep):
            self.config.hydra.sweep.dir = str(folder)
        self._trees.clear()

    def _launch(self, overrides: list[str], number: int) -> JobReturn:
        assert self.launcher is not None
        return self.launcher.launch([overrides], initial_job_idx=number)[0]


class _Remembering:
    """Hydra's config loader, for a launcher: what was composed to be checked is not composed again to run."""

    def __init__(self, loader: Any, trees: dict[tuple[str, ...], DictConfig]) -> None:
        self._loader, self._trees = loader, trees

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        known = self._trees.pop(tuple(sweep_overrides), None)
        if known is not None:
            return known
        from mgm_exp.hydra_limits import refuse_foreign

        tree: DictConfig = self._loader.load_sweep_config(master_config, sweep_overrides)
        refuse_foreign(tree)
        return tree

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
