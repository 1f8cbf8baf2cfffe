"""``mgm-exp plan [OVERRIDES]``: what a run or every cell of a sweep needs and costs, before anything starts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mgm_exp.errors import EXIT_BAD_INPUT, EXIT_DOES_NOT_FIT, EXIT_DONE, ConfigError, UserError
from mgm_exp.verbs.this_machine import ThisMachine

if TYPE_CHECKING:
    from mgm_exp.config import ExperimentConfig
    from mgm_exp.plan import CellPlan

_COMPONENTS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")


def run(arguments: list[str]) -> int:
    """Prints the plan of each cell; 3 if one does not fit, 2 if one cannot be run at all."""
    parser = argparse.ArgumentParser(
        prog="mgm-exp plan",
        description="What a run, or every cell of a grid, needs and costs: parameters, memory, steps, tokens, hours, "
        "disk. Nothing is read but the configuration; no weights and no data have to be there.",
    )
    parser.add_argument("overrides", nargs="*", help="as for a run; a,b makes several cells")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan as JSON, too")
    parser.add_argument("--explain", action="store_true", help="every moment of each stage, and what is counted")
    parser.add_argument(
        "--calibration", action="store_true", help="finished runs of this machine: predicted and measured, side by side"
    )
    parser.add_argument(
        "--probe", action="store_true", help="measure this machine for 20 seconds first (kept in paths.root)"
    )
    parser.add_argument("-m", "--multirun", action="store_true", help=argparse.SUPPRESS)  # as it is typed for a sweep
    options = parser.parse_intermixed_args(arguments)
    from mgm_exp.plan import plan_cell

    plans, refused = [], []
    machine = ThisMachine(measures=options.probe)
    for overrides, config in cells_of(options.overrides):
        if isinstance(config, ConfigError):
            refused.append({"overrides": overrides, "error": str(config)})
        else:
            plans.append(plan_cell(config, overrides, measured=machine.measured(config)))
    show(plans, explain=options.explain)
    for cell in refused:
        print(f"cannot run: {' '.join(cell['overrides'])}: {cell['error']}")
    if options.calibration:
        machine.show()
    if options.json is not None:
        from mgm_exp.store import write_json_atomic

        if not options.json.parent.is_dir():
            raise UserError(f"--json {options.json}: its folder does not exist.")
        cells = [plan.to_json() for plan in plans]
        write_json_atomic(options.json, {"schema_version": 1, "cells": cells, "refused": refused, **machine.to_json()})
        print(f"written: {options.json}")
    if any(plan.verdict == "does not fit" for plan in plans):
        return EXIT_DOES_NOT_FIT
    return EXIT_BAD_INPUT if refused else EXIT_DONE


def cells_of(overrides: Sequence[str]) -> list[tuple[list[str], ExperimentConfig | ConfigError]]:
    """Each cell of a grid with its checked configuration, or with why it has none; a single run is one cell.

    Raises:
        ConfigError: none of them composes.
    """
    from mgm_exp.compose import checked, compose_tree, session
    from mgm_exp.grid import parse_grid

    found: list[tuple[list[str], ExperimentConfig | ConfigError]] = []
    with session() as hydra:
        tree = compose_tree(hydra, overrides, is_sweep=True)
        params = tree.hydra.sweeper.get("params") or {}
        if "optuna" in str(tree.hydra.sweeper.get("_target_", "")):
            params = {}  # a search has no cells: its fixed part is planned, and what the command line gives
        plain_params = {str(key): str(value) for key, value in params.items()}
        grid = parse_grid(overrides, plain_params, hydra.config_loader)
        for cell in grid.cells():
            given = [*cell.overrides, "hydra.mode=RUN"]
            swept = [f"{key}={value}" for key, value in cell.params.items()]
            try:
                config: ExperimentConfig | ConfigError = checked(compose_tree(hydra, given), given)
            except ConfigError as error:
                config = error
            found.append((swept or list(overrides), config))
    errors = [config for _, config in found if isinstance(config, ConfigError)]
    if len(errors) == len(found):
        raise errors[0]
    return found


def show(plans: Sequence[CellPlan], *, explain: bool = False) -> None:
    """One line a cell, then what is needed to read it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    table = Table(box=None, pad_edge=False)
    for name, side in (
        ("cell", "left"), ("millions", "right"), ("trained", "right"), *((part, "right") for part in _COMPONENTS),
        ("peak GiB", "right"), ("in", "left"), ("steps", "right"), ("hours", "right"), ("cost", "right"),
        ("disk GiB", "right"), ("verdict", "left"),
    ):  # fmt: skip
        table.add_column(name, justify=side, overflow="fold", no_wrap=side == "right")  # type: ignore[arg-type]
    for plan in plans:
        row = plan.to_json()
        memory = row["memory_gib"]
        colour = {"fits": "green", "tight": "yellow"}.get(plan.verdict, "red")
        table.add_row(
            Text(" ".join(plan.overrides) or "(the default)"),
            f"{row['parameters']['total'] / 1e6:,.1f}",
            f"{row['parameters']['trainable'] / 1e6:,.2f}",
            *(f"{memory[part]:.2f}" for part in _COMPONENTS),
            f"{memory['peak']:.2f}",
            f"{row['stage']}, {row['moment']}",
            _number(row["steps"], ","),
            _number(row["hours"], ".2f"),
            _number(row["cost"], ".2f"),
            f"{row['disk_gib']:.2f}",
            Text(f"{plan.verdict} in {plan.device}", style=colour),
        )
    console.print(table)
    for plan in plans:
        name = " ".join(plan.overrides) or "(the default)"
        for line in plan.advice:
            console.print(Text(f"{name}: try {line}"), soft_wrap=True)
    for note in dict.fromkeys(note for plan in plans for note in plan.notes):
        console.print(Text(f"note: {note}"), soft_wrap=True)
    if explain:
        for plan in plans:
            _explain(plan, console)
        console.print(Text(_RULES), soft_wrap=True)


def _explain(plan: CellPlan, console: object) -> None:
    """The moments of each stage; how each number comes about."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    assert isinstance(console, Console)
    for stage in plan.stages:
        work = stage.work
        console.print()
        console.print(
            Text(
                f"{' '.join(plan.overrides) or '(the default)'}: {stage.name}: {stage.parameters.trainable:,} of "
                f"{stage.parameters.total:,} parameters trained; {work.batch} x {work.length} tokens in a pass, "
                f"{work.bytes} bytes a number{' under autocast' if work.autocast else ''}"
                f"{', gradient checkpointing' if work.checkpointing else ''}"
                f"{f', ZeRO-{work.zero_stage} over {work.devices}' if work.zero_stage else ''}"
                f"{f'; {stage.flops:.3g} operations in {stage.steps} steps' if stage.flops and stage.steps else ''}"
            ),
            style="bold",
            soft_wrap=True,
        )
        table = Table(box=None, pad_edge=False)
        table.add_column("GiB alive at this moment", no_wrap=True)
        for name in (*_COMPONENTS, "sum"):
            table.add_column(name, justify="right")
        for moment in stage.moments:
            values = [getattr(moment, part) for part in _COMPONENTS]
            style = "bold" if moment is stage.peak else ""
            table.add_row(moment.name, *(f"{v / 2**30:.3f}" for v in (*values, moment.total)), style=style)
        console.print(table)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


_RULES = """
weights      fp32 where plain PyTorch trains them, else the compute dtype; ZeRO-3: a share, and what is gathered
gradients    4 bytes a trained parameter (plain PyTorch); ZeRO: 2 bytes, a share
optimizer    8 bytes a trained parameter; ZeRO: 12 (with fp32 masters), a share; none on the card with offload
activations  kept for the backward pass, and what runs: LLM blocks, patch info mining, the ConvNeXt map
logits       learnt positions x vocabulary, at most 2^27 elements at a time
buffers      copies of trained weights for autocast, ZeRO's buckets, AdamW's temporaries
The peak is the largest sum of what is alive at one moment; docs/plan.md has every formula and how it was checked."""
