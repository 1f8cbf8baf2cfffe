"""What a trial costs beside its training: ours, plain Optuna, and Hydra's own sweeper.

The task does nothing but leave a score. Ours and Hydra's both compose the configuration of every trial, write it into
the trial's folder and call the task in this process; ours also checks the point before it starts, keeps the study in a
journal that survives any kill, claims the trial, and rewrites ``sweep.json``. Plain Optuna does none of it but the
study: it shows what a trial costs that has no configuration and no folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measurement import Row, timed

TRIALS, TRIALS_QUICK = 40, 6
SEARCHED = ("adapter.rank=range(1,65)", "train.lr=tag(log,interval(1e-4,1e-2))")


def run(work: Path, quick: bool = False) -> list[Row]:
    """Measures all three."""
    trials = TRIALS_QUICK if quick else TRIALS
    ours_s, ours = timed(lambda: _ours(work / "ours", trials))
    hydra_s, hydra = timed(lambda: _hydra(work / "hydra", trials))
    optuna_s, optuna = timed(lambda: _optuna(work / "plain.journal", trials))
    same = ours == hydra == optuna == trials
    exactness = f"all three ran {trials} trials" if same else f"DIFFERENT: {ours}, {hydra}, {optuna} trials"
    what = f"{trials} trials of a task that does nothing, in one process, start-up of the command included"
    return [
        Row(
            "overhead of a trial: mgm_optuna and Hydra's basic sweeper",
            "ms",
            1000 * ours_s / trials,
            1000 * hydra_s / trials,
            None,
            exactness,
            f"{what}; Hydra runs a fixed list of values and keeps no record of how they ended",
        ),
        Row(
            "overhead of a trial: mgm_optuna and plain Optuna",
            "ms",
            1000 * ours_s / trials,
            1000 * optuna_s / trials,
            None,
            exactness,
            f"{what}; Optuna: TPESampler(multivariate=True), JournalFileBackend, no configuration, no folders",
        ),
    ]


def _task(config: Any, run_dir: Path, *, command: list[str], overrides: list[str], sweep: str | None) -> dict[str, Any]:
    """Leaves the score that the rank says."""
    from mgm_exp.store import write_json_atomic

    run_dir.mkdir(parents=True, exist_ok=True)
    result = {
        "status": "completed",
        "metrics": {"demo/accuracy": config.adapter.rank / 64},
        "wall_s": 0.0,
        "error": None,
    }
    write_json_atomic(run_dir / "result.json", result)
    return result


def _quietly(work: Any) -> Any:
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()):
        return work()


def _ours(root: Path, trials: int) -> int:
    from mgm_exp.command import run_sweep

    overrides = ["hydra/sweeper=mgm_optuna", *SEARCHED, f"sweep.n_trials={trials}", f"paths.root={root}"]
    record = _quietly(lambda: run_sweep(overrides, task=_task))
    return sum(trial["status"] == "completed" for trial in record["trials"])


def _hydra(root: Path, trials: int) -> int:
    from mgm_exp.command import Job
    from mgm_exp.compose import CONFIG_NAME, session

    ranks = ",".join(str(1 + number) for number in range(trials))
    overrides = [
        "hydra/sweeper=basic",
        "hydra.mode=MULTIRUN",
        f"adapter.rank={ranks}",
        f"paths.root={root}",
        "sweep.name=s",
    ]

    def sweep() -> Sequence[Any]:
        with session() as hydra:
            return hydra.multirun(CONFIG_NAME, Job(task=_task), overrides)[0]

    return sum(job.return_value.result is not None for job in _quietly(sweep))


def _optuna(journal: Path, trials: int) -> int:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("train.lr", 1e-4, 1e-2, log=True)
        return trial.suggest_int("adapter.rank", 1, 64) / 64

    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(journal))),
        direction="maximize",
        sampler=optuna.samplers.TPESampler(multivariate=True, seed=0),
    )
    study.optimize(objective, n_trials=trials)
    return sum(trial.state.is_finished() for trial in study.trials)
