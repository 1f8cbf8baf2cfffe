"""The sweeper ``mgm_grid``, the default of ``-m``: every cell of a grid once, whatever happens to the others.

It differs from Hydra's own in what a long sweep needs: every cell is checked before the first one starts, a cell's
number and folder stay the same from call to call, finished cells are not run again and interrupted ones continue, one
that fails harms no other, and ``sweep.json`` says after each trial how things stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra.plugins.sweeper import Sweeper

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn
    from hydra.plugins.launcher import Launcher
    from hydra.types import HydraContext, TaskFunction
    from omegaconf import DictConfig

    from mgm_exp.config import ExperimentConfig
    from mgm_exp.grid import Cell, Grid
    from mgm_exp.ledger import Ledger, Trial
    from mgm_exp.search import Ending
    from mgm_exp.slots import Slots, Work


class MgmGridSweeper(Sweeper):
    """See the module.

    Args:
        params: What a sweep file sweeps: key -> values as on the command line.
    """

    def __init__(self, params: dict[str, Any]) -> None:
        super().__init__()
        self.params = {str(key): str(value) for key, value in params.items()}
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None
        self.hydra_context: HydraContext | None = None
        self.task_function: Any = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from hydra.core.plugins import Plugins

        self.config, self.hydra_context, self.task_function = config, hydra_context, task_function
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

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
        from mgm_exp.errors import ConfigError, UserError
        from mgm_exp.folders import read_record
        from mgm_exp.grid import parse_grid
        from mgm_exp.ledger import Ledger
        from mgm_exp.sweep_folder import open_sweep

        assert self.config is not None and self.hydra_context is not None
        grid = parse_grid(arguments, self.params, self.hydra_context.config_loader)
        cells = self._check(grid)
        some_config = next(config for _, config in cells if not isinstance(config, Exception))
        if some_config.sweep.seeds != 1:
            raise ConfigError(
                f"sweep.seeds={some_config.sweep.seeds} repeats the trials of a search; a grid has an axis for it.",
                advice="Give seed=0,1,2 in its place.",
            )
        objective = some_config.sweep.objective or f"{some_config.eval.benchmarks[0]}/accuracy"
        with open_sweep(self.config, grid.name) as (folder, name):
            if read_record(folder / "sweep.json").get("sweeper") == "mgm_optuna":
                raise UserError(f"{folder} holds a search, not a grid.", advice="Give sweep.name=ANOTHER.")
            ledger = Ledger(folder, name, objective, some_config.sweep.direction)
            ledger.command = list(arguments)
            return Round(self, ledger, some_config, grid.early_keys()).run(cells)

    def _check(self, grid: Grid) -> list[tuple[Cell, ExperimentConfig | Exception]]:
        """Composes and validates every cell, before the first one starts."""
        from mgm_exp.errors import ConfigError

        checked = [(cell, self._config_of(cell)) for cell in grid.cells()]
        faults = [config for _, config in checked if isinstance(config, Exception)]
        if len(faults) == len(checked):
            first = faults[0]
            others = "" if len(faults) == 1 else f" (None of the {len(faults)} cells composes; this is the first.)"
            raise ConfigError(f"{getattr(first, 'message', first)}{others}", advice=getattr(first, "advice", ""))
        return checked

    def _config_of(self, cell: Cell) -> ExperimentConfig | Exception:
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException

        from mgm_exp.compose import checked, explained
        from mgm_exp.errors import ConfigError

        assert self.config is not None and self.hydra_context is not None
        try:
            tree = self.hydra_context.config_loader.load_sweep_config(self.config, list(cell.overrides))
            return checked(tree, cell.overrides)
        except ConfigError as error:
            return error
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            return explained(error, cell.overrides)


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
        self.rerun = config.sweep.rerun
        self.slots = self._make_slots(config)
        self.running: dict[int, Trial] = {}
        self.is_left = False
        self.losses: dict[int, int] = {}

    def _make_slots(self, config: ExperimentConfig) -> Slots:
        from mgm_exp.slots import make_slots
        from mgm_exp.sweep_folder import record_failure

        sweeper = self.sweeper
        return make_slots(sweeper.launcher, config, sweeper.task_function.program, self._launch, record_failure)

    def run(self, cells: Sequence[tuple[Cell, ExperimentConfig | Exception]]) -> dict[str, Any]:
        """Runs what is not done, and leaves ``sweep.json`` and the comparison."""
        from mgm_exp.errors import Interrupted

        try:
            return self._run(cells)
        except (KeyboardInterrupt, Interrupted) as stop:
            self.slots.stop()
            for trial in self.running.values():
                self.ledger.note(trial)
            self.ledger.status = "interrupted"
            self.ledger.write()
            if isinstance(stop, KeyboardInterrupt):
                raise
            where = ", ".join(str(number) for number in self.running) or "no trial"
            raise Interrupted(
                f"Stopped in trial {where} of sweep {self.ledger.name}; {_counts(self.ledger)}.",
                advice="The same command continues.",
            ) from stop

    def _run(self, cells: Sequence[tuple[Cell, ExperimentConfig | Exception]]) -> dict[str, Any]:
        from mgm_exp.stages import config_hash

        hashes = [None if isinstance(config, Exception) else config_hash(config) for _, config in cells]
        trials = self.ledger.enrol([(cell, key) for (cell, _), key in zip(cells, hashes, strict=True)])
        self._announce(trials)
        self.ledger.write()
        wanted = []
        for trial, (_, config) in zip(trials, cells, strict=True):
            if isinstance(config, Exception):
                self._refuse(trial, config)
            elif self._is_wanted(trial):
                wanted.append(trial)
        self._work(wanted)
        if self.is_left:
            return self._submitted()
        ended = [self.ledger.trials[trial.number].status for trial in trials]
        self.ledger.status = "completed" if all(status in ("completed", "pruned") for status in ended) else "failed"
        content = self.ledger.write()
        self._compare()
        return content

    def _is_wanted(self, trial: Trial) -> bool:
        from mgm_exp.config import Rerun

        if trial.status in ("completed", "pruned"):
            return bool(self.rerun is Rerun.all)
        return trial.status != "failed" or self.rerun is not Rerun.none

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

    def _work(self, wanted: list[Trial]) -> None:
        """Keeps every slot busy until nothing is left."""
        total, begun = len(wanted), 0
        while wanted or self.slots.busy:
            while wanted and self.slots.busy < self.slots.size:
                trial = self._pick(wanted)
                begun += trial.number not in self.losses
                self._start(trial, f"{begun}/{total}")
                if self.slots.size == 1:
                    break
            ended = self.slots.ended(0.5)
            for work, ending in ended:
                again = self._ended(self.running.pop(work.number), work, ending)
                wanted[:0] = [again] if again else []
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

    def _pick(self, wanted: list[Trial]) -> Trial:
        """The next trial: rather one that does not wait for stages which a running one makes."""
        making = [self._early(trial) for trial in self.running.values()]
        made = [self._early(trial) for trial in self.ledger.trials.values() if trial.status == "completed"]
        chosen = next((t for t in wanted if self._early(t) not in making or self._early(t) in made), wanted[0])
        wanted.remove(chosen)
        return chosen

    def _early(self, trial: Trial) -> tuple[str, ...]:
        return tuple(str(trial.params.get(key)) for key in self.early_keys)

    def _start(self, trial: Trial, position: str) -> None:
        from mgm_exp.folders import wait_until_free
        from mgm_exp.slots import Work, in_sweep

        print(f"\ntrial {trial.number} ({position}): {_words(trial)}", flush=True)
        run_dir = self.ledger.run_dir(trial)
        overrides = [*trial.overrides, *in_sweep(trial.number, self.ledger.name, str(trial.number))]
        if self.slots.are_here:
            wait_until_free(run_dir, print)
        self.running[trial.number] = trial
        self.slots.start(Work(trial.number, run_dir, tuple(overrides)))

    def _ended(self, trial: Trial, work: Work, ending: Ending) -> Trial | None:
        """Notes how a trial ended; the trial, if it was lost and goes on from its checkpoint."""
        from mgm_exp.errors import ProcessKilled
        from mgm_exp.folders import read_record
        from mgm_exp.search.outcome import Verdict, judge
        from mgm_exp.sweep_folder import record_failure, record_stop

        if ending.exit_code not in (None, 0):
            outcome = judge(read_record(work.run_dir / "result.json"), (), ending)
            lost = self.losses.get(trial.number, 0) + 1
            if outcome.verdict is Verdict.lost and lost <= self.settings.retries:
                self.losses[trial.number] = lost
                print(f"trial {trial.number}: {outcome.reason}; it goes on from its checkpoint", flush=True)
                return trial
            if outcome.verdict is Verdict.interrupted and ending.set_aside:
                record_stop(work.run_dir, outcome.reason, trial.overrides)
            elif not outcome.result or outcome.result.get("status") == "interrupted":
                record_failure(work.run_dir, ProcessKilled(outcome.reason), trial.overrides)
        now = self.ledger.note(trial)
        if self.slots.size > 1 or now.status != "completed":
            value = self.ledger.value(now)
            error = now.error or {}
            words = f"{error.get('message', '')} {error.get('advice', '')}".strip()
            score = "" if value is None else f" {self.ledger.objective} {value:.4f}"
            print(f"trial {trial.number} {now.status}{score}{f': {words}' if words else ''}", flush=True)
        return None

    def _launch(self, overrides: list[str], number: int) -> JobReturn:
        from omegaconf import read_write

        sweeper = self.sweeper
        assert sweeper.config is not None and sweeper.launcher is not None
        with read_write(sweeper.config.hydra.sweep):
            sweeper.config.hydra.sweep.dir = str(self.ledger.folder)
        return sweeper.launcher.launch([overrides], initial_job_idx=number)[0]

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
