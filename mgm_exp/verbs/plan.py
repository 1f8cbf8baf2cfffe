"""``mgm-exp plan [OVERRIDES]``: what a run or every cell of a sweep needs and costs, before anything starts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mgm_exp.errors import EXIT_BAD_INPUT, EXIT_DOES_NOT_FIT, EXIT_DONE, ConfigError
from mgm_exp.verbs.arguments import check_json
from mgm_exp.verbs.progress_bar import progress_bar
from mgm_exp.verbs.this_machine import ThisMachine

if TYPE_CHECKING:
    from rich.console import Console

    from mgm_exp.config import ExperimentConfig
    from mgm_exp.plan import CellPlan

# Columns of words, which may be folded, and how narrow they may become.
_TEXTS, _LEAST_TEXT = ("cell", "in", "verdict"), 16
_WIDEST = 10_000


@dataclass(frozen=True)
class Sweep:
    """What a command line would run.

    Args:
        cells: Overrides of each, with its checked configuration or why it has none; a single run is one cell.
        trials: Of a search, whose fixed part is the only cell; None: a grid.
        is_packed: Whether trials train in one process (``hydra/launcher=packed``).
    """

    cells: list[tuple[list[str], ExperimentConfig | ConfigError]]
    trials: int | None = None
    is_packed: bool = False


def run(arguments: list[str]) -> int:
    """Prints the plan of each cell; 3 if one does not fit, 2 if one cannot be run at all."""
    options = _options(arguments)
    check_json(options.json)
    from mgm_exp.curated import curated_rows
    from mgm_exp.plan import plan_cell
    from mgm_exp.verbs.sweep_total import totals

    cells, refused = [], []
    machine = ThisMachine(measures=options.probe)
    sweep = sweep_of(options.overrides)
    for overrides, config in sweep.cells:
        if isinstance(config, ConfigError):
            refused.append({"overrides": overrides, "error": str(config)})
            continue
        curated = curated_rows(config)
        cells.append((config, plan_cell(config, overrides, measured=machine.measured(config), curated=curated)))
    plans = [plan for _, plan in cells]
    show(plans, explain=options.explain)
    for cell in refused:
        print(f"cannot run: {' '.join(cell['overrides'])}: {cell['error']}")
    summed = totals(cells, trials=sweep.trials)
    if len(cells) > 1 or sweep.trials is not None or any(total.runs > 1 for total in summed):
        for total in summed:
            print(total.in_words())
    packs = _packs(cells) if sweep.is_packed else []
    for line in packs:
        print(line)
    if options.calibration:
        machine.show()
    if options.json is not None:
        from mgm_exp.store import write_json_atomic

        written = {
            "schema_version": 1,
            "cells": [plan.to_json() for plan in plans],
            "refused": refused,
            "totals": [total.to_json() for total in summed],
            "packs": packs,
            **machine.to_json(),
        }
        write_json_atomic(options.json, written)
        print(f"written: {options.json}")
    if any(plan.verdict == "does not fit" for plan in plans):
        return EXIT_DOES_NOT_FIT
    return EXIT_BAD_INPUT if refused else EXIT_DONE


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mgm-exp plan",
        description="What a run, or every cell of a grid, needs and costs: parameters, memory, steps, tokens, hours, "
        "money, disk. Read are the configuration, config.json of the model, and what curation said of the same rows "
        "before; no weights and no data have to be there.",
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
    return parser.parse_intermixed_args(arguments)


def sweep_of(overrides: Sequence[str]) -> Sweep:
    """Each cell of a grid, or the fixed part of a search.

    Raises:
        ConfigError: none of them composes.
    """
    from mgm_exp.compose import checked, compose_tree, session
    from mgm_exp.grid import parse_grid

    found: list[tuple[list[str], ExperimentConfig | ConfigError]] = []
    trials = None
    with session() as hydra, progress_bar() as on_progress:
        tree = compose_tree(hydra, overrides, is_sweep=True)
        params = tree.hydra.sweeper.get("params") or {}
        if "optuna" in str(tree.hydra.sweeper.get("_target_", "")):
            params = {}  # a search has no cells: its fixed part is planned, and what the command line gives
            trials = int(tree.sweep.n_trials)
        is_packed = "packed" in str(tree.hydra.launcher.get("_target_", ""))
        plain_params = {str(key): str(value) for key, value in params.items()}
        grid = parse_grid(overrides, plain_params, hydra.config_loader)
        cells = list(grid.cells())
        for number, cell in enumerate(cells):
            if len(cells) > 1:
                on_progress("cells read", number, len(cells))
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
    return Sweep(found, trials, is_packed)


def _packs(cells: Sequence[tuple[ExperimentConfig, CellPlan]]) -> list[str]:
    """Who would train together, by predicted memory, and what a pack needs."""
    from mgm_exp.packed.fit import needs_of, packs_of
    from mgm_exp.packed.stories import Run

    lines: list[str] = []
    by_room: dict[float, list[Run]] = {}
    for number, (config, plan) in enumerate(cells):
        run = Run(config, Path(" ".join(plan.overrides).replace("/", "_") or str(number)), [], plan.overrides, None)
        by_room.setdefault(plan.room_gib, []).append(run)
    for room, runs in by_room.items():
        for pack in packs_of(runs, lines.append, room):
            needs = [needs_of(run.config) for run in pack.runs]
            width = pack.width or len(pack.runs)
            gib = needs[0].base + sum(one.state for one in needs) + width * max(one.passing for one in needs)
            names = "; ".join(" ".join(run.overrides) for run in pack.runs)
            lines.append(f"pack of {len(pack.runs)}, {width} in a pass: {gib:.1f} of {room:.1f} GiB: {names}")
    return lines


def show(plans: Sequence[CellPlan], *, explain: bool = False, console: Console | None = None) -> None:
    """A line for each cell, or where they are too wide for the terminal a paragraph; then what is needed to read it."""
    from rich.console import Console
    from rich.text import Text

    from mgm_exp.verbs.plan_explained import explain_cell, rules

    console = console or Console()
    if not console.is_terminal:
        console = Console(width=220)
    _show_cells([(plan, _columns(plan)) for plan in plans], console)
    for plan in plans:
        name = " ".join(plan.overrides) or "(the default)"
        for line in plan.advice:
            console.print(Text(f"{name}: try {line}"), soft_wrap=True)
    for note in dict.fromkeys(note for plan in plans for note in plan.notes):
        console.print(Text(f"note: {note}"), soft_wrap=True)
    if explain:
        for plan in plans:
            explain_cell(plan, console)
        console.print(Text(rules()), soft_wrap=True)


def _columns(plan: CellPlan) -> dict[str, str]:
    """What is shown of a cell."""
    from mgm_exp.plan.memory import COMPONENTS

    row = plan.to_json()
    memory, parameters = row["memory_gib"], row["parameters"]
    return {
        "cell": " ".join(plan.overrides) or "(the default)",
        "millions": f"{parameters['total'] / 1e6:,.1f}",
        "trained": f"{parameters['trainable'] / 1e6:,.2f}",
        **{part: f"{memory[part]:.2f}" for part in COMPONENTS},
        "peak GiB": f"{memory['peak']:.2f}",
        "in": f"{row['stage']}, {row['moment']}",
        "host GiB": f"{row['host_gib']['peak']:.1f}",
        "steps": _number(row["steps"], ","),
        "hours": _number(row["hours"], ".2f"),
        "GPU-h": _number(row["gpu_hours"], ".2f"),
        "cost": f"{_number(row['cost'], '.2f')} {row['currency']}".strip(),
        "disk GiB": f"{row['disk_gib']:.2f}",
        "verdict": f"{plan.verdict} in {plan.device}",
    }


def _show_cells(cells: Sequence[tuple[CellPlan, dict[str, str]]], console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    colours = {"fits": "green", "tight": "yellow"}
    table = Table(box=None, pad_edge=False)
    for name in cells[0][1]:
        widest = max(len(name), *(len(columns[name]) for _, columns in cells))
        if name in _TEXTS:
            table.add_column(name, overflow="fold", min_width=min(widest, _LEAST_TEXT))
        else:
            table.add_column(name, justify="right", no_wrap=True, min_width=widest)
    for plan, columns in cells:
        values = [Text(value) for value in columns.values()]
        values[-1].stylize(colours.get(plan.verdict, "red"))
        table.add_row(*values)
    # As narrow as it may become: what is wider than the terminal would lose columns and digits
    if console.measure(table, options=console.options.update(max_width=_WIDEST)).minimum <= console.width:
        console.print(table)
        return
    for plan, columns in cells:
        verdict = Text(columns["verdict"], style=colours.get(plan.verdict, "red"))
        console.print(Text.assemble(f"{columns['cell']}: ", verdict), soft_wrap=True)
        rest = [f"{name} {value}" for name, value in columns.items() if value and name not in ("cell", "verdict")]
        console.print(Text(f"  {', '.join(rest)}"))


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"
