"""The command line of the scripts that make the shipped models: their options, and a bar for each phase."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from mgm_exp.data.demo.teaching import Report

Make = Callable[[Path, Any, Path, "Report"], dict[str, Any]]
"""Called as make(out, recipe, work, report); gives the measures of what it has made."""


def make_from_command_line(program: str, says: str, recipe: Any, make: Make, arguments: list[str] | None) -> None:
    """Makes a model as the command line asks, and prints its measures.

    Args:
        program: What was typed before the arguments.
        says: One line: what is made.
        recipe: That of the shipped weights: a frozen dataclass with `seed` and `scaled(scale)`.
        arguments: None: those of this process.
    """
    parser = argparse.ArgumentParser(prog=program, description=says)
    parser.add_argument("--out", type=Path, required=True, help="folder for the result")
    parser.add_argument("--work", type=Path, help="folder for the state between phases (default: OUT with .work added)")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="steps and pictures of all phases times this")
    parser.add_argument("--seed", type=int, default=recipe.seed)
    given = parser.parse_args(arguments)
    recipe = replace(recipe, seed=given.seed)
    if given.steps_scale != 1.0:
        recipe = recipe.scaled(given.steps_scale)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[measures]}"),
    )
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        tasks: dict[str, Any] = {}

        def report(phase: str, step: int, steps: int, measures: dict[str, float]) -> None:
            text = "  ".join(f"{name} {value:.3f}" for name, value in measures.items())
            if phase not in tasks:
                tasks[phase] = progress.add_task(phase, total=steps, measures="")
            progress.update(tasks[phase], completed=step, measures=text)

        work = given.work or given.out.with_name(given.out.name + ".work")
        measures = make(given.out, recipe, work, report)
    print(json.dumps(measures, indent=1))
