"""Who proposes the next point, found by a name; every draw is a function of the seed, the trial and the history.

Optuna's samplers draw from one stream of random numbers: a sampler that is made again after a restart repeats its first
draws, and two sweepers with equal seeds propose equal points. Here each draw gets a stream of its own, seeded by the
sweep's seed, the trial's number and the parameter. So a search that was killed and continued proposes what an
undisturbed one does, as long as the trials before ended alike.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from optuna.samplers import BaseSampler

from mgm_exp.config import SamplerConfig, SamplerName
from mgm_exp.errors import MissingDependencyError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial, TrialState

    from mgm_exp.search.space import Space

# User attribute of a trial: by how much it misses each constraint; above 0 it is infeasible.
VIOLATIONS = "violations"
# Points of a generation of NSGA-II where none is given, as in Deb et al. (2002) and in Optuna.
NSGA2_POPULATION = 50

_NEEDS = {SamplerName.gp: ("scipy", "torch"), SamplerName.cmaes: ("cmaes",), SamplerName.qmc: ("scipy",)}


def make_sampler(
    config: SamplerConfig, space: Space, *, with_constraints: bool = False, with_pauses: bool = False
) -> BaseSampler:
    """The sampler that ``sweep.sampler`` names.

    Args:
        config: ``sweep.sampler``.
        space: What is searched.
        with_constraints: Whether trials may be infeasible (samplers that can, learn to avoid these).
        with_pauses: Whether trials wait at rungs: these run for Optuna, and are not to count as bad ones.

    Raises:
        MissingDependencyError: a package that this sampler needs is not installed.
        ConfigError: ``grid`` over something without end.
    """
    import importlib.util

    missing = [name for name in _NEEDS.get(config.name, ()) if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"sweep.sampler.name={config.name.value} needs {' and '.join(missing)}, which this environment lacks.",
            advice="pip install 'mgm-exp[search]', or use tpe, nsga2 or random, which need nothing more.",
        )
    constraints = violations_of if with_constraints else None
    if config.name is SamplerName.grid:
        return GridSampler(space.grid(), config.seed)

    def make(seed: int) -> BaseSampler:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna calls most of its options experimental
            return _make(config, seed, space.is_conditional, constraints, constant_liar=not with_pauses)

    if config.name is SamplerName.qmc:  # a sequence of points, which one seed numbers: it has to stay one
        return make(config.seed)
    return PerTrialSampler(make, config.seed)


def _make(
    config: SamplerConfig,
    seed: int,
    is_conditional: bool,
    constraints: Callable[[FrozenTrial], Sequence[float]] | None,
    *,
    constant_liar: bool,
) -> BaseSampler:
    from optuna import samplers

    name, startup = config.name, config.startup
    if name is SamplerName.tpe:
        return samplers.TPESampler(
            seed=seed,
            n_startup_trials=startup,
            multivariate=True,
            group=is_conditional,
            # A trial that runs elsewhere counts as a bad one: its place is not proposed again.
            constant_liar=constant_liar,
            constraints_func=constraints,
            warn_independent_sampling=False,
        )
    if name is SamplerName.gp:
        return samplers.GPSampler(
            seed=seed, n_startup_trials=startup, constraints_func=constraints, warn_independent_sampling=False
        )
    if name is SamplerName.cmaes:
        return samplers.CmaEsSampler(
            seed=seed, n_startup_trials=startup, popsize=config.population, warn_independent_sampling=False
        )
    if name is SamplerName.nsga2:
        return samplers.NSGAIISampler(
            seed=seed, constraints_func=constraints, population_size=config.population or NSGA2_POPULATION
        )
    if name is SamplerName.qmc:
        # What is no number is drawn beside the sequence: by the trial, not from one stream.
        others = PerTrialSampler(lambda of_trial: samplers.RandomSampler(seed=of_trial), seed)
        return samplers.QMCSampler(
            seed=seed, scramble=True, independent_sampler=others, warn_independent_sampling=False
        )
    return samplers.RandomSampler(seed=seed)


def violations_of(trial: FrozenTrial) -> Sequence[float]:
    """By how much a trial misses each constraint; Optuna asks this of every trial that ended."""
    return list(trial.user_attrs.get(VIOLATIONS, ())) or [0.0]


class PerTrialSampler(BaseSampler):
    """A sampler with a stream of random numbers for each trial and parameter; see the module.

    Args:
        make: Seed -> the sampler that draws. It must keep nothing in memory that the storage does not hold.
        seed: Of the sweep.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int) -> None:
        self._make, self._seed = make, seed

    def _for(self, trial: FrozenTrial, what: str) -> BaseSampler:
        digest = hashlib.sha256(f"{self._seed}/{trial.number}/{what}".encode()).digest()
        return self._make(int.from_bytes(digest[:4], "big") >> 1)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._for(trial, "space").infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        sampler = self._for(trial, "relative")
        sampler.infer_relative_search_space(study, trial)  # what it notes there it needs here
        return sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._for(trial, f"independent {param_name}").sample_independent(
            study, trial, param_name, param_distribution
        )

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._for(trial, "before").before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self._for(trial, "after").after_trial(study, trial, state, values)


class GridSampler(BaseSampler):
    """Every point of a grid once, in an order that the seed shuffles; the upper bounds are points too.

    Optuna's own wants to end a loop of Optuna's when it has been through, and refuses points that were given.

    Args:
        grid: Name -> its values.
        seed: Of the order.
    """

    PLACE = "grid_place"

    def __init__(self, grid: dict[str, list[Any]], seed: int) -> None:
        self.names = list(grid)
        self.points = list(itertools.product(*grid.values()))
        random.Random(seed).shuffle(self.points)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Gives the trial the first point that no other one has; the first of all where none is left."""
        if self.PLACE in trial.system_attrs or "fixed_params" in trial.system_attrs:
            return
        taken = {self._place(other) for other in study.get_trials(deepcopy=False) if other.number != trial.number}
        place = next((number for number in range(len(self.points)) if number not in taken), 0)
        study._storage.set_trial_system_attr(trial._trial_id, self.PLACE, place)

    def _place(self, trial: FrozenTrial) -> int | None:
        if self.PLACE in trial.system_attrs:
            return int(trial.system_attrs[self.PLACE])
        given = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        point = tuple(given.get(name) for name in self.names)
        return self.points.index(point) if point in self.points else None

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        place = trial.system_attrs.get(self.PLACE)
        if place is None:  # a point that was given in part
            place = trial.number % len(self.points)
        return self.points[place][self.names.index(param_name)]
