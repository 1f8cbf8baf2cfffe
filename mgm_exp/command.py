"""One command line, from arguments to an exit code: what ``python -m mgm_exp``, ``mgm-exp run`` and notebooks share.

A single run is composed, checked, given its folder and handed to Hydra; a sweep is handed to the configured sweeper,
which does the same for each cell. Nothing starts before everything is checked.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgm_exp import bootstrap
from mgm_exp.config import ExperimentConfig
from mgm_exp.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, ConfigError, MgmError

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra
    from omegaconf import DictConfig

Task = Callable[..., dict[str, Any]]
# Set by this package in a cell's overrides; of no interest to a reader of tags.
_OWN_KEYS = ("trial", "sweep.name", "launch.machines", "launch.pack", "sweep.pause_after")
# Launchers that mean nothing to a single run: it is done in this process.
_FOR_ONE_RUN = ("BasicLauncher", "MgmWarmLauncher")


@dataclass(frozen=True)
class Job:
    """What Hydra calls for a run or a trial: the task, and what a sweep needs to run it in another process.

    Args:
        task: With the signature of ``run_experiment``, the default.
        command: The command line, for the manifest.
        program: The command line, without overrides, that runs one experiment with this task; empty: there is none.
        config: What the tree is, where it was checked already.
    """

    task: Task | None = None
    command: tuple[str, ...] = ()
    program: tuple[str, ...] = ()
    config: ExperimentConfig | None = None

    def __call__(self, tree: DictConfig) -> Outcome:
        return job(tree, task=self.task, command=self.command, config=self.config)


@dataclass(frozen=True)
class Outcome:
    """How a job ended; it is returned, not raised, so that one failing trial does not end its sweep."""

    result: dict[str, Any] | None = None
    error: Exception | None = None


def run(overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Runs one experiment: ``run(["adapter=lora_r16"])`` is ``python -m mgm_exp adapter=lora_r16``.

    Returns:
        The content of ``result.json``.

    Raises:
        ConfigError: the overrides do not compose, or ask for a sweep.
        MgmError: the run failed or was interrupted; its folder has ``result.json``.
    """
    given = list(overrides)
    return run_once(given, command=["mgm_exp.run", *given])


def sweep(overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Runs a sweep: ``sweep(["adapter=lora_r8,lora_r16"])`` is ``python -m mgm_exp -m adapter=lora_r8,lora_r16``.

    Returns:
        The content of ``sweep.json``; a trial that failed has the status ``failed`` in it and raises nothing.

    Raises:
        ConfigError: no cell of the sweep composes.
        Interrupted: a signal stopped it; the same call continues.
    """
    given = list(overrides)
    return run_sweep(given, command=["mgm_exp.sweep", *given])


def run_once(
    overrides: list[str], *, config_dir: str | None = None, command: Sequence[str] = (), task: Task | None = None
) -> dict[str, Any]:
    """One run; see :func:`run`.

    Args:
        overrides: As they were typed.
        config_dir: A folder with more presets.
        command: The command line, for the manifest.
        task: What to run, with the signature of ``run_experiment``, the default.
    """
    from mgm_exp.compose import checked, compose_tree, session
    from mgm_exp.folders import LEASE, wait_until_free
    from mgm_exp.store import Lease, LeaseHeld

    with session(config_dir) as hydra:
        tree = compose_tree(hydra, overrides)
        if _is_multirun(tree):
            raise ConfigError("These overrides describe a sweep (hydra.mode=MULTIRUN), not one run; use -m or sweep().")
        config = checked(tree, overrides)
        refuse_hydra_settings(tree)
        launcher = str(tree.hydra.launcher._target_).rpartition(".")[2]
        if config.trial is None and launcher not in _FOR_ONE_RUN:
            raise ConfigError(
                "A launcher (hydra/launcher=...) is for sweeps: one run would stay on this machine.",
                advice="Give -m with it: a sweep of one trial is a run that is launched.",
            )
        wanted = _given(overrides, "hydra.run.dir")
        while True:
            folder = _wanted_folder(tree, config) if wanted else _run_folder(config)
            if wanted and os.environ.get(bootstrap.WAIT) == "1":
                wait_until_free(folder, print)
            arguments = bootstrap.quote_numeric_choices(overrides)
            if wanted and str(folder) == str(tree.hydra.run.dir):
                loader: Any = hydra.config_loader  # see compose.session
                loader.hand_out(arguments, tree)
            else:
                arguments.append(f"hydra.run.dir={quoted(str(folder))}")
            try:
                return _one_job(hydra, arguments, Job(task, tuple(command), config=config))
            except LeaseHeld:
                if wanted:
                    raise
                # Another command was quicker to take the unfinished run: this one makes a run of its own. Or its owner
                # was killed and its last processes are still ending: then this one goes on with it.
                if Lease(folder / LEASE).holder() is None:
                    wait_until_free(folder, print)


def _run_folder(config: ExperimentConfig) -> Path:
    from mgm_exp.folders import run_folder

    return run_folder(config)


def _wanted_folder(tree: DictConfig, config: ExperimentConfig) -> Path:
    from mgm_exp.folders import confined

    return confined(Path(str(tree.hydra.run.dir)), Path(config.paths.root), "hydra.run.dir")


def _one_job(hydra: Hydra, overrides: list[str], task: Callable[[DictConfig], Outcome]) -> dict[str, Any]:
    from mgm_exp.compose import CONFIG_NAME

    outcome = hydra.run(CONFIG_NAME, task, overrides).return_value
    if outcome.error is not None:
        raise outcome.error
    return dict(outcome.result)


def run_sweep(
    overrides: list[str],
    *,
    config_dir: str | None = None,
    command: Sequence[str] = (),
    task: Task | None = None,
    program: Sequence[str] | None = None,
) -> dict[str, Any]:
    """A sweep through the configured sweeper; see :func:`sweep` and, for the arguments, :func:`run_once`."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from mgm_exp.compose import CONFIG_NAME, compose_tree, explained, session
    from mgm_exp.signals import stop_on_signals
    from mgm_exp.slots import own_program

    with session(config_dir) as hydra, stop_on_signals():
        tree = compose_tree(hydra, overrides, is_sweep=True)
        refuse_hydra_settings(tree)
        if not str(tree.hydra.sweeper._target_).startswith("hydra_plugins.mgm_exp_plugins."):
            raise ConfigError(
                "That sweeper keeps no record of its trials.", advice="Take hydra/sweeper=mgm_grid or mgm_optuna."
            )
        arguments = bootstrap.quote_numeric_choices([item for item in overrides if not item.startswith("hydra.mode=")])
        try:
            own = own_program(config_dir) if task is None else ()
            trial = Job(task, tuple(command), tuple(program or own))
            result = hydra.multirun(CONFIG_NAME, trial, [*arguments, "hydra.mode=MULTIRUN"])
        except (HydraException, OmegaConfBaseException) as error:
            raise explained(error, overrides) from error
    return dict(result)


def job(
    tree: DictConfig,
    *,
    task: Task | None = None,
    command: Sequence[str] = (),
    config: ExperimentConfig | None = None,
) -> Outcome:
    """What Hydra calls for a run or a trial, in its folder, possibly in another process."""
    from hydra.core.hydra_config import HydraConfig

    from mgm_exp.compose import checked

    hydra = HydraConfig.get()
    overrides = [item for item in hydra.overrides.task if item.partition("=")[0].lstrip("+") not in _OWN_KEYS]
    try:
        config = config or checked(tree, overrides)
        result = (task or _run_experiment)(
            config,
            Path(hydra.runtime.output_dir),
            command=list(command),
            overrides=overrides,
            sweep=config.sweep.name if config.trial is not None else None,
        )
    except Exception as error:  # noqa: BLE001 - handed to the caller whole; see Outcome
        if not isinstance(error, MgmError):
            traceback.print_exc()
        return Outcome(error=error)
    return Outcome(result=result)


def _run_experiment(*args: Any, **kwargs: Any) -> dict[str, Any]:
    from mgm_exp.experiment import run_experiment

    return run_experiment(*args, **kwargs)


def refuse_hydra_settings(tree: DictConfig) -> None:
    """Refuses what would make Hydra write elsewhere than in the run folder.

    Raises:
        ConfigError: ``hydra.output_subdir`` is not a plain name, or ``hydra.job.chdir`` is on.
    """
    from mgm_exp.config import NAME

    if tree.hydra.job.chdir:
        raise ConfigError("hydra.job.chdir=true is not supported: relative paths (paths.root, data.path) would change.")

    subdir = tree.hydra.output_subdir
    if subdir is not None and not NAME.fullmatch(str(subdir).lstrip(".")):
        raise ConfigError(f"hydra.output_subdir={subdir!r} must be a plain folder name, such as .hydra.")


def quoted(text: str) -> str:
    """``text`` as one quoted value in Hydra's grammar."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _given(overrides: Sequence[str], key: str) -> bool:
    return any(item.partition("=")[0].lstrip("+") == key for item in overrides)


def _is_multirun(tree: DictConfig) -> bool:
    from hydra.types import RunMode

    return bool(tree.hydra.mode == RunMode.MULTIRUN)


# -- the command line --------------------------------------------------------------------------------------------


def main(
    argv: Sequence[str] | None = None,
    *,
    program: str = "python -m mgm_exp",
    task: Task | None = None,
    child: Sequence[str] | None = None,
) -> int:
    """``python -m mgm_exp ARGUMENTS``: the exit code.

    Args:
        argv: None: ``sys.argv``.
        program, task, child: See :func:`run_arguments`.
    """
    _end_with_parent()
    arguments = list(sys.argv[1:] if argv is None else argv)
    body = partial(run_arguments, program=program, task=task, child=child)
    if bootstrap.WARM in os.environ:
        from mgm_exp.warm.worker import inherited_channel, serve

        channel = inherited_channel()
        if channel is not None:
            return serve(channel, lambda run: guarded(body, [*arguments, *run]), loads_torch=task is None)
    return guarded(body, arguments)


def _end_with_parent() -> None:
    """A trial that a sweep started ends with the sweep, however that ends; its own children have their own parents."""
    parent = os.environ.pop(bootstrap.PARENT, "")
    if parent.isdigit():
        from mgm_exp.store import die_with_parent

        die_with_parent(parent_pid=int(parent))


def guarded(body: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Runs a command and turns its errors into one paragraph and an exit code.

    Args:
        body: Takes the arguments without ``--debug``; gives the exit code.
        arguments: The command line; ``--debug`` (or ``HYDRA_FULL_ERROR=1``) shows tracebacks.
    """
    bootstrap.offline()
    wants_traceback = "--debug" in arguments or os.environ.get("HYDRA_FULL_ERROR") == "1"
    try:
        return body([argument for argument in arguments if argument != "--debug"])
    except MgmError as error:
        if wants_traceback:
            traceback.print_exc()
        print(f"error: {error}" if error.exit_code != EXIT_INTERRUPTED else str(error), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("Stopped by Ctrl-C.", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # | head
        sys.stderr.close()
        return EXIT_DONE


def run_arguments(
    arguments: list[str], *, program: str, task: Task | None = None, child: Sequence[str] | None = None
) -> int:
    """The exit code of a command line that describes a run or a sweep; errors are raised.

    Args:
        arguments: Without ``--debug``.
        program: What was typed before them, for usage messages and the manifest.
        task: What to run in place of an experiment.
        child: The command line that runs one trial of a sweep with this task; None: this package's own.
    """
    bootstrap.plugins()
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.prog = program
    options = parser.parse_intermixed_args(arguments)
    if options.help:
        from mgm_exp.helptext import help_text

        print(help_text())
        return EXIT_DONE
    if options.experimental_rerun is not None:
        raise ConfigError("--experimental-rerun loads a pickle, which could run anything; give the overrides again.")
    if options.config_path is not None or options.config_name is not None:
        raise ConfigError("The configuration is the package's own.", advice="Add presets with --config-dir DIR.")
    if options.hydra_help or options.cfg or options.info or options.shell_completion or options.resolve:
        return _shown(arguments)
    command = [*program.split(), *arguments]
    chosen: dict[str, Any] = {"config_dir": options.config_dir, "command": command, "task": task}
    from mgm_exp.train.board import board_of_experiment

    with board_of_experiment():
        return _run_or_sweep(options, chosen, child)


def _run_or_sweep(options: Any, chosen: dict[str, Any], child: Sequence[str] | None) -> int:
    if options.multirun or _describes_sweep(options.overrides, options.config_dir):
        return _exit_code(run_sweep(options.overrides, **chosen, program=child))
    try:
        run_once(options.overrides, **chosen)
    except MgmError:
        raise
    except Exception as error:  # noqa: BLE001 - its traceback is printed where it happened
        print(f"error: the run failed: {type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_DONE


def _describes_sweep(overrides: list[str], config_dir: str | None) -> bool:
    """Whether a chosen file (``+sweeps=NAME``) or override sets Hydra's mode to a sweep."""
    modes = [item for item in overrides if item.startswith("hydra.mode=")]
    if modes and modes[-1] == "hydra.mode=RUN":  # a trial of a sweep
        return False
    may_set_it = re.compile(r"\+{0,2}(?:sweeps|experiment|debug|hydra[./].*)=")
    if config_dir is None and not any(may_set_it.match(item) for item in overrides):
        return False
    from mgm_exp.compose import compose_tree, session

    with session(config_dir) as hydra:
        return _is_multirun(compose_tree(hydra, overrides, is_sweep=True))


def _exit_code(record: dict[str, Any]) -> int:
    """1 if a trial of this command failed."""
    if record.get("status") == "submitted":
        return EXIT_DONE
    mine = record.get("grid", [trial["number"] for trial in record["trials"]])
    states = [trial["status"] for trial in record["trials"] if trial["number"] in mine]
    # A search whose hours are over leaves trials that go on with more of them.
    left = ("paused", "interrupted") if record.get("stopped_because") else ()
    return EXIT_DONE if all(state in ("completed", "pruned", *left) for state in states) else EXIT_FAILED


def _shown(arguments: list[str]) -> int:
    """``--cfg``, ``--info`` and the like: Hydra shows, nothing runs."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from mgm_exp.compose import explained, refuse_unsafe

    bootstrap.register()
    overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    refuse_unsafe(overrides)
    with _hydra_speaks(["mgm_exp", *bootstrap.quote_numeric_choices(arguments)]):
        try:
            with bootstrap.one_version_of_hydra():
                show = hydra.main(config_path=str(bootstrap.CONF), config_name="config", version_base="1.3")(job)
            show()
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise explained(error, overrides) from error
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else EXIT_DONE
    return EXIT_DONE


@contextmanager
def _hydra_speaks(argv: list[str]) -> Iterator[None]:
    """Hydra reads ``sys.argv``, hands its errors on only where this variable is set, and wants to be the only one."""
    from hydra.core.global_hydra import GlobalHydra

    old_argv, old_errors, old_hydra = sys.argv, os.environ.get("HYDRA_FULL_ERROR"), GlobalHydra.instance().hydra
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = argv, "1"
    GlobalHydra.instance().clear()
    try:
        with bootstrap.logging_kept():
            yield
    finally:
        sys.argv, GlobalHydra.instance().hydra = old_argv, old_hydra
        if old_errors is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = old_errors
