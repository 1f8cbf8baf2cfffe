"""The group ``sweep``: many runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mgm_exp.config.choices import Direction, PrunerName, Rerun, SamplerName


@dataclass
class SamplerConfig:
    """How a search proposes points (hydra/sweeper=mgm_optuna)."""

    name: SamplerName = SamplerName.tpe
    # Every draw depends on it, on the trial's number and on what the trials before have shown.
    seed: int = 0
    # Trials that are drawn at random before the sampler begins to learn.
    startup: int = 8
    # Points of a generation (nsga2, cmaes). null: the sampler's own.
    population: int | None = None


@dataclass
class PrunerConfig:
    """How a search stops hopeless trials; needs train.validation.every_steps (wilcoxon: sweep.seeds)."""

    name: PrunerName = PrunerName.asha
    # No trial is stopped (rungs: pauses) before this optimizer step. null: at its first validation point at the
    # earliest.
    min_step: int | None = None
    # asha, rungs, hyperband: one of so many trials goes on from each rung to the next, which lasts so many times as
    # long.
    reduction_factor: int = 3
    # rungs: whether all trials have come to a rung before the best of them leave it. true: the winner does not depend
    # on the number of slots or on what took how long; false: no slot waits for the slowest, for many slots.
    synchronous: bool = True
    # median, patient, wilcoxon: trials that end before any is stopped (wilcoxon: seeds).
    startup: int = 3
    # patient: validation points without progress that are waited for.
    patience: int = 2
    # patient: what counts as progress.
    min_delta: float = 0.0
    # wilcoxon: a trial is stopped when it is worse than the best one with this p-value.
    p_threshold: float = 0.1


@dataclass
class BudgetConfig:
    """When a search starts no more trials. All calls of the same sweep count together."""

    # Hours in which sweepers worked on it.
    hours: float | None = None
    # Trials in all, as sweep.n_trials; the smaller of the two counts.
    trials: int | None = None
    # Hours x devices in use.
    gpu_hours: float | None = None
    # What becomes of running trials when the hours are used up. false: they end first, so that none is half done;
    # true: they save their state and stop, for an allocation that ends then; more hours continue them.
    interrupt: bool = False


@dataclass
class PlateauConfig:
    """When a search is over because it finds nothing better any more."""

    # Completed trials in a row without a better one. null: never.
    trials: int | None = None
    # What counts as better: at least so much beyond the best value.
    min_delta: float = 0.0


@dataclass
class SweepConfig:
    """A multirun (-m): a grid (mgm_grid, the default) or a search (hydra/sweeper=mgm_optuna)."""

    # Folder name below <paths.root>/sweeps. null: what is swept plus a short hash of the rest of the config.
    name: str | None = None
    # Metric of result.json that orders the runs. null: the first benchmark's accuracy.
    objective: str | None = None
    direction: Direction = Direction.maximize
    # Several at once (a search looks for the Pareto front): metrics, or peak_memory_gib, wall_s, train_tokens_per_s,
    # trainable_parameters; directions has one entry for each. They take the place of objective and direction.
    objectives: list[str] = field(default_factory=list)
    directions: list[Direction] = field(default_factory=list)
    # Finished trials that the same command runs again (a search: failed ones only, under a new number).
    rerun: Rerun = Rerun.none
    # Trials of a search in all, however often the command is given.
    n_trials: int = 20
    # Runs of each trial, with seeds seed, seed+1, ...: its value is their mean.
    seeds: int = 1
    # Trials at the same time, each with GPUs of its own. null: one for each set of `devices` GPUs of this machine, one
    # without GPUs; with hydra/launcher=basic one, in the sweep's own process.
    slots: int | None = None
    # A new process for each trial, rather than a worker that stays for the next one (hydra/launcher=warm).
    isolate: bool = False
    # The run saves its state and pauses at its first validation point at or after this step of the instruct stage; the
    # same command with a later one, or null, continues it. A search with sweep.pruner.name=rungs sets it for each run.
    pause_after: int | None = None
    # How often a trial that was lost (a killed process, a lost machine) is continued before it counts as failed.
    retries: int = 3
    # Trials that may fail for an unknown reason before the sweep stops.
    max_failures: int = 5
    # Where the study is kept: null: study.journal in the sweep's folder; sqlite: study.db in it; a path; or a URL
    # (sqlite:///..., postgresql+psycopg://...; grpc://HOST:PORT for mgm-exp study-server; passwords belong into the
    # environment).
    storage: str | None = None
    # Points that are tried first: what is swept and its value; what is left out is chosen by the sampler.
    enqueue: list[dict[str, Any]] = field(default_factory=list)
    # What must hold of every trial, such as "adapter.rank * adapter.alpha <= 512" or "peak_memory_gib <= 20".
    constraints: list[str] = field(default_factory=list)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    pruner: PrunerConfig = field(default_factory=PrunerConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    plateau: PlateauConfig = field(default_factory=PlateauConfig)
