"""The sweeper ``mgm_grid``, the default of ``-m``: every cell of a grid once, whatever happens to the others.

It differs from Hydra's own in what a long sweep needs: every cell is checked before the first one starts, a cell's
number and folder stay the same from call to call, finished cells are not run again and interrupted ones continue, one
that fails harms no other, and ``sweep.json`` says after each trial how things stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra_plugins.mgm_exp_plugins.composing import ComposingSweeper

if TYPE_CHECKING:
    from pathlib import Path

    from mgm_exp.config import ExperimentConfig
    from mgm_exp.grid import Cell, Grid
    from mgm_exp.ledger import Ledger, Run, Trial
    from mgm_exp.search import Ending
    from mgm_exp.slots import Work


class MgmGridSweeper(ComposingSweeper):
    """See the module.

    Args:
        params: What a sweep file sweeps: key -> values as on the command line.
    """

    def sweep(self, arguments: list[str]) -> dict[str, Any]:
        """Runs the grid.

        Args:
            arguments: The overrides of the command line, Hydra's own left out.

        Returns:
            The content of ``sweep.json``.

        Raises:
            ConfigError: no cell composes, or the sweep as a whole cannot be.
            LeaseHeld: the same sweep is running already.
            Interrupted: a signal stopped it; everything that ended is in ``sweep.json``.
        """
        from mgm_exp.errors import ConfigError
        from mgm_exp.grid import parse_grid
        from mgm_exp.ledger import Ledger
        from mgm_exp.sweep_folder import open_sweep

        assert self.config is not None and self.hydra_context is not None
        params = {str(key): str(value) for key, value in self.params.items()}
        grid = parse_grid(arguments, params, self.hydra_context.config_loader)
        cells = self._check(grid)
        some_config = next(config for _, config in cells if not isinstance(config, Exception))
        sweep = some_config.sweep
        if sweep.constraints:
            raise ConfigError(
                f"sweep.constraints={sweep.constraints} is for searches (hydra/sweeper=mgm_optuna); a grid runs every "
                "cell.",
                advice="Leave the cells out of the grid; `mgm-exp plan` shows which do not fit.",
            )
        if sweep.seeds > 1 and any(axis.key == "seed" for axis in grid.axes):
            raise ConfigError(
                f"seed is swept, and sweep.seeds={sweep.seeds} repeats each cell with seeds of its own; give one of "
                "the two."
            )
        objective = sweep.objective or f"{some_config.eval.benchmarks[0]}/accuracy"
        with open_sweep(self.config, lambda tree: grid.name(tree, sweep.seeds)) as (folder, name):
            _refuse_other_sweep(folder, sweep.seeds)
            self.write_into(folder)
            ledger = Ledger(folder, name, objective, sweep.direction)
            ledger.command = list(arguments)
            return Round(self, ledger, some_config, grid.early_keys()).run(cells)

    def _check(self, grid: Grid) -> list[tuple[Cell, ExperimentConfig | Exception]]:
        """Composes and validates every cell, before the first one starts."""
        from mgm_exp.config import PrunerName
        from mgm_exp.errors import ConfigError, DoesNotFit

        checked = [(cell, self._config_of(cell)) for cell in grid.cells()]
        faults = [config for _, config in checked if isinstance(config, Exception)]
        if len(faults) == len(checked):
            first = faults[0]
            others = "" if len(faults) == 1 else f" (None of the {len(faults)} cells can be run; this is the first.)"
            kind = DoesNotFit if isinstance(first, DoesNotFit) else ConfigError
            raise kind(f"{getattr(first, 'message', first)}{others}", advice=getattr(first, "advice", ""))
        for _, config in checked:
            if not isinstance(config, Exception) and (
                config.sweep.pause_after is not None or config.sweep.pruner.name is PrunerName.rungs
            ):
                raise ConfigError(
                    "A grid runs every cell to its end: sweep.pruner.name=rungs and sweep.pause_after are a search's.",
                    advice="hydra/sweeper=mgm_optuna sweep.sampler.name=grid runs every point of a grid, with rungs.",
                )
        return checked

    def _config_of(self, cell: Cell) -> ExperimentConfig | Exception:
        from mgm_exp.capacity import refuse_cell
        from mgm_exp.errors import ConfigError

        try:
            config = self.config_of(cell.overrides)
            refuse_cell(config)
            return config
        except ConfigError as error:
            return error


def _refuse_other_sweep(folder: Path, seeds: int) -> None:
    """A folder keeps its kind: a search or a grid, with one run a trial or with a run for each seed."""
    from mgm_exp.errors import UserError
    from mgm_exp.folders import read_record

    record = read_record(folder / "sweep.json")
    if record.get("sweeper") == "mgm_optuna":
        raise UserError(f"{folder} holds a search, not a grid.", advice="Give sweep.name=ANOTHER.")
    before = record.get("seeds", 1)
    if record and (before > 1) != (seeds > 1):
        raise UserError(
            f"{folder} holds a grid with sweep.seeds={before}, and now sweep.seeds={seeds} was given: its trials are "
            f"{'folders of several runs' if before > 1 else 'single runs'}.",
            advice="Give sweep.name=ANOTHER: what the trials have in common is taken from the store.",
        )


class Round:
    """One call of the sweep command: its trials, one after another or in several slots.

    Args:
        sweeper: Checked the cells and launches.
        ledger: The sweep's books.
        config: Of one of the cells: what all have in common.
        early_keys: The axes that decide the early stages.
    """

    def __init__(
        self, sweeper: MgmGridSweeper, ledger: Ledger, config: ExperimentConfig, early_keys: Sequence[str]
    ) -> None:
        self.sweeper, self.ledger, self.settings, self.early_keys = sweeper, ledger, config.sweep, early_keys
        self.alerts = config.alerts
        self.rerun = config.sweep.rerun
        self.slots = sweeper.make_slots(config)
        self.running: dict[Path, Run] = {}
        self.is_left = False
        self.losses: dict[Path, int] = {}
        # Early stages that a completed run has made.
        self.made_early: set[tuple[str, ...]] = set()

    def run(self, cells: Sequence[tuple[Cell, ExperimentConfig | Exception]]) -> dict[str, Any]:
        """Runs what is not done, and leaves ``sweep.json`` and the comparison."""
        from mgm_exp.errors import Interrupted

        try:
            return self._run(cells)
        except (KeyboardInterrupt, Interrupted) as stop:
            self.slots.stop()
            for run in self.running.values():
                self.ledger.note(run.trial)
            self.ledger.status = "interrupted"
            self.ledger.write()
            if isinstance(stop, KeyboardInterrupt):
                raise
            where = ", ".join(str(run) for run in self.running.values()) or "no trial"
            raise Interrupted(
                f"Stopped in trial {where} of sweep {self.ledger.name}; {_counts(self.ledger)}.",
                advice="The same command continues.",
            ) from stop
        finally:
            self.slots.close()

    def _run(self, cells: Sequence[tuple[Cell, ExperimentConfig | Exception]]) -> dict[str, Any]:
        from mgm_exp.alerts import tell_sweep
        from mgm_exp.repeats import seeds_of
        from mgm_exp.stages import config_hash

        hashes = [None if isinstance(config, Exception) else config_hash(config) for _, config in cells]
        trials = self.ledger.enrol(
            [(cell, key) for (cell, _), key in zip(cells, hashes, strict=True)],
            [[] if isinstance(config, Exception) else seeds_of(config.seed, config.sweep.seeds) for _, config in cells],
        )
        self._announce(trials)
        self.ledger.write()
        wanted = []
        for trial, (_, config) in zip(trials, cells, strict=True):
            if isinstance(config, Exception):
                self._refuse(trial, config)
            elif self._is_wanted(trial):
                wanted.append(trial)
        self._work([run for run in self.ledger.runs(wanted) if self._is_wanted(run)])
        if self.is_left:
            return self._submitted()
        ended = [self.ledger.trials[trial.number].status for trial in trials]
        self.ledger.status = "completed" if all(status in ("completed", "pruned") for status in ended) else "failed"
        content = self.ledger.write()
        self._compare()
        tell_sweep(self.alerts, self.ledger.folder, content)
        return content

    def _is_wanted(self, what: Trial | Run) -> bool:
        from mgm_exp.config import Rerun

        if what.status in ("completed", "pruned"):
            return bool(self.rerun is Rerun.all)
        return what.status != "failed" or self.rerun is not Rerun.none

    def _announce(self, trials: Sequence[Trial]) -> None:
        print(f"sweep {self.ledger.name}: {len(trials)} trial(s) in {self.ledger.folder}", flush=True)
        for trial in trials:
            if trial.config_hash is not None and not self._is_wanted(trial):
                again = "sweep.rerun=all" if trial.status in ("completed", "pruned") else "sweep.rerun=failed"
                value = self.ledger.value(trial)
                score = "" if value is None else f", {self.ledger.objective} {value:.4f}"
                print(f"trial {trial.number} {_words(trial)}: {trial.status} before{score} ({again} runs it again)")
            elif trial.status == "interrupted":
                print(f"trial {trial.number} {_words(trial)}: was interrupted and continues")

    def _refuse(self, trial: Trial, error: Exception) -> None:
        """A cell that does not compose is a failed trial with a record; the others run."""
        from mgm_exp.sweep_folder import record_failure

        print(f"trial {trial.number} {_words(trial)}: not started: {error}", flush=True)
        record_failure(self.ledger.run_dir(trial), error, trial.overrides)
        self.ledger.note(trial)

    def _work(self, wanted: list[Run]) -> None:
        """Keeps every slot busy until nothing is left."""
        total, begun = len(wanted), 0
        done = (run for run in self.ledger.runs(self.ledger.trials.values()) if run.status == "completed")
        self.made_early = {self._early(run) for run in done}
        while wanted or self.slots.busy:
            while wanted and self.slots.busy < self.slots.size:
                run = self._pick(wanted)
                begun += run.folder not in self.losses
                self._start(run, f"{begun}/{total}")
                if self.slots.size == 1:
                    break
            ended = self.slots.ended(0.5)
            for work, ending in ended:
                run = self.running.pop(work.run_dir)
                if self._is_lost(run, work, ending):
                    wanted.insert(0, run)
                else:
                    self._ended(run, wanted)
            self.ledger.catch_up()
            if self.slots.busy and not ended and not wanted and self.slots.may_leave():
                self.is_left = True
                return

    def _submitted(self) -> dict[str, Any]:
        """The trials are with somebody else, and this command ends (``launch.wait=false``)."""
        name, count = self.ledger.name, len(self.running)
        self.ledger.status = "submitted"
        content = self.ledger.write()
        print(
            f"sweep {name}: {count} trial(s) submitted. `mgm-exp status {name}` shows them; the same command goes on."
        )
        return content

    def _pick(self, wanted: list[Run]) -> Run:
        """The next run: rather one that does not wait for stages which a running one makes."""
        making = {self._early(run) for run in self.running.values()}
        chosen = next(
            (r for r in wanted if self._early(r) not in making or self._early(r) in self.made_early), wanted[0]
        )
        wanted.remove(chosen)
        return chosen

    def _early(self, run: Run) -> tuple[str, ...]:
        return (str(run.seed), *(str(run.trial.params.get(key)) for key in self.early_keys))

    def _start(self, run: Run, position: str) -> None:
        from mgm_exp.folders import wait_until_free
        from mgm_exp.slots import Work, in_sweep

        trial = run.trial
        of_seed = [] if run.seed is None else [f"seed={run.seed}"]
        print(f"\ntrial {trial.number} ({position}): {' '.join([_words(trial), *of_seed])}", flush=True)
        subdir = run.folder.relative_to(self.ledger.folder).as_posix()
        overrides = [*trial.overrides, *of_seed, *in_sweep(trial.number, self.ledger.name, subdir)]
        if self.slots.are_here:
            wait_until_free(run.folder, print)
        self.running[run.folder] = run
        self.slots.start(Work(trial.number, run.folder, tuple(overrides)))

    def _is_lost(self, run: Run, work: Work, ending: Ending) -> bool:
        """Whether it was killed from outside and goes on from its checkpoint; leaves a record where it does not."""
        from mgm_exp.errors import ProcessKilled
        from mgm_exp.folders import read_record
        from mgm_exp.search.outcome import Verdict, judge
        from mgm_exp.sweep_folder import record_failure, record_stop

        if ending.exit_code in (None, 0):
            return False
        outcome = judge(read_record(work.run_dir / "result.json"), (), ending)
        lost = self.losses.get(run.folder, 0) + 1
        if outcome.verdict is Verdict.lost and lost <= self.settings.retries:
            self.losses[run.folder] = lost
            print(f"trial {run}: {outcome.reason}; it goes on from its checkpoint", flush=True)
            return True
        if outcome.verdict is Verdict.interrupted and ending.set_aside:
            record_stop(work.run_dir, outcome.reason, run.trial.overrides)
        elif not outcome.result or outcome.result.get("status") == "interrupted":
            record_failure(work.run_dir, ProcessKilled(outcome.reason), run.trial.overrides)
        return False

    def _ended(self, run: Run, wanted: list[Run]) -> None:
        """Notes how a run ended. A trial of which one seed did not complete runs no further one."""
        from mgm_exp.ledger import state_of

        now = self.ledger.note(run.trial)
        number = run.trial.number
        if state_of(run.folder) == "completed":
            self.made_early.add(self._early(run))
        else:
            wanted[:] = [other for other in wanted if other.trial.number != number]
        if any(other.trial.number == number for other in (*wanted, *self.running.values())):
            return
        if self.slots.size > 1 or now.seeds or now.status != "completed":
            value = self.ledger.value(now)
            error = now.error or {}
            words = f"{error.get('message', '')} {error.get('advice', '')}".strip()
            of_all = f" (mean of {len(now.seeds)} seeds)" if now.seeds else ""
            score = "" if value is None else f" {self.ledger.objective} {value:.4f}{of_all}"
            print(f"trial {number} {now.status}{score}{f': {words}' if words else ''}", flush=True)

    def _compare(self) -> None:
        from mgm_exp.verbs.report import report

        if any(trial.status is not None for trial in self.ledger.trials.values()):
            print()
            folder = self.ledger.folder
            report([folder], folder / "comparison.json", folder / "table.md", html=folder / "report.html")


def _words(trial: Trial) -> str:
    from mgm_exp.ledger import in_words

    return in_words(trial.params)


def _counts(ledger: Ledger) -> str:
    states = [ledger.trials[number].status or "not started" for number in ledger.grid]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
