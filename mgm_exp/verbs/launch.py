"""``mgm-exp launch``: a sweep through its launcher; ``--dry-run`` prints what would be submitted."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mgm_exp.config import ExperimentConfig
from mgm_exp.errors import EXIT_DONE, ConfigError

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra
    from omegaconf import DictConfig

    from mgm_exp.slots import Work

LAUNCHERS = ("slurm", "volcano")


def run(arguments: list[str]) -> int:
    """``mgm-exp launch [--dry-run] OVERRIDES``; the exit code."""
    parser = argparse.ArgumentParser(
        prog="mgm-exp launch",
        description="Runs a sweep through its launcher, as python -m mgm_exp -m OVERRIDES does.",
        epilog="Example: mgm-exp launch --dry-run hydra/launcher=slurm adapter=lora_r8,lora_r16",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the batch script or the manifests, submit nothing"
    )
    parser.add_argument("--config-dir", help="a folder with more presets")
    parser.add_argument("overrides", nargs="*", help="group=choice and key=value; a,b is swept")
    options = parser.parse_intermixed_args(arguments)
    if options.dry_run:
        for text in rendered(options.overrides, options.config_dir):
            print(text)
        return EXIT_DONE
    from mgm_exp.command import run_arguments

    presets = ["--config-dir", options.config_dir] if options.config_dir else []
    return run_arguments(["-m", *presets, *options.overrides], program="mgm-exp launch")


def rendered(overrides: Sequence[str], config_dir: str | None = None) -> Iterator[str]:
    """What a sweep with these overrides would submit: one batch script, or a manifest for each cell.

    Raises:
        ConfigError: it does not compose, or its launcher submits nothing.
    """
    from mgm_exp.command import refuse_hydra_settings
    from mgm_exp.compose import compose_tree, session
    from mgm_exp.slots import own_program

    with session(config_dir) as hydra:
        tree = compose_tree(hydra, overrides, is_sweep=True)
        refuse_hydra_settings(tree)
        launcher = str(tree.hydra.launcher._target_).rpartition(".mgm_exp_plugins.")[2].partition("_launcher.")[0]
        if launcher not in LAUNCHERS:
            raise ConfigError(
                "Only what goes to a cluster can be shown before it is submitted.",
                advice=f"Give {' or '.join(f'hydra/launcher={name}' for name in LAUNCHERS)} (or a preset of theirs).",
            )
        works, config = _works(hydra, tree, overrides)
        if launcher == "slurm":
            yield _slurm_script(tree, works, own_program(config_dir))
        else:
            yield from _manifests(tree, works, config)


def _works(hydra: Hydra, tree: DictConfig, overrides: Sequence[str]) -> tuple[list[Work], ExperimentConfig]:
    """The runs of a sweep that begins: every cell of a grid; of a search the first trial, without its point."""
    from mgm_exp.compose import checked, compose_tree
    from mgm_exp.grid import Cell, parse_grid
    from mgm_exp.slots import Work, in_sweep
    from mgm_exp.sweep_folder import place

    is_search = str(tree.hydra.sweeper._target_).endswith(".MgmOptunaSweeper")
    arguments = [item for item in overrides if not item.startswith("hydra.mode=")]
    if is_search:
        fixed = tuple(_fixed_of_search(arguments, tree))
        cells, default_name = [Cell(fixed, {})], lambda _: "search"
    else:
        grid = parse_grid(arguments, {str(key): str(value) for key, value in tree.hydra.sweeper.params.items()})
        cells, default_name = list(grid.cells()), grid.name
    folder, name = place(tree, default_name)
    works, config = [], None
    for number, cell in enumerate(cells):
        config = checked(compose_tree(hydra, [*cell.overrides, "hydra.mode=RUN"]), cell.overrides)
        work_overrides = (*cell.overrides, *in_sweep(number, name, str(number)))
        works.append(Work(number, folder / str(number), work_overrides))
    assert config is not None
    config.sweep.name = name
    return works, config


def _fixed_of_search(arguments: Sequence[str], tree: DictConfig) -> list[str]:
    from omegaconf import OmegaConf

    from mgm_exp.compose import parse
    from mgm_exp.search import parse_space

    params: Any = OmegaConf.to_container(tree.hydra.sweeper.params)
    return list(parse_space(list(arguments), params, parse).fixed)


def _slurm_script(tree: DictConfig, works: Sequence[Work], program: Sequence[str]) -> str:
    from mgm_exp.slots import run_arguments_of
    from mgm_exp.slurm import FOLDER, render_script, settings_of

    sweep = works[0].run_dir.parent.resolve()
    return render_script(
        settings_of(tree.hydra.launcher),
        name=sweep.name,
        folder=sweep / FOLDER / "dry-run",
        program=program,
        runs=[(work.run_dir.resolve(), run_arguments_of(work)) for work in works],
        is_array=len(works) > 1,
    )


def _manifests(tree: DictConfig, works: Sequence[Work], config: ExperimentConfig) -> Iterator[str]:
    from mgm_exp.volcano import settings_of
    from mgm_exp.volcano_slots import manifest_of

    settings = settings_of(tree.hydra.launcher)
    for work in works:
        yield manifest_of(settings, config, work).rstrip()
