"""``mgm-exp suggest --memory 24 --data N``: settings to begin with, each with its reason."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgm_exp.errors import EXIT_DONE, UserError
from mgm_exp.verbs.arguments import check_json, count

if TYPE_CHECKING:
    from mgm_exp.plan.suggestion import Suggestion

# Of the number on a box that a process can have.
_OFF_THE_BOX = 0.98


def run(arguments: list[str]) -> int:
    """Prints the settings, the table of adapters and sharding, and the command."""
    options = _options(arguments)
    if not 0 < options.memory < math.inf:
        raise UserError(f"--memory {options.memory} must be above 0, in GB.")
    check_json(options.json)
    from mgm_exp.compose import checked, compose_tree, session
    from mgm_exp.plan.cards import Device
    from mgm_exp.plan.suggestion import suggest

    fixed = [f"model={options.model}", *options.overrides]
    device = Device(f"{options.memory:g} GB", options.memory * _OFF_THE_BOX, None)
    with session() as hydra:

        def config_of(overrides: Sequence[str]) -> Any:
            arguments = [*overrides, f"plan.rows={options.data}", f"plan.text_tokens={options.text_tokens}"]
            return checked(compose_tree(hydra, arguments), arguments)

        found = suggest(
            config_of,
            fixed,
            devices=options.devices,
            rows=options.data,
            text_tokens=options.text_tokens,
            device=device,
        )
    _show(found, [f"model={options.model}", f"devices={options.devices}", *options.overrides], options)
    if options.json is not None:
        from mgm_exp.store import write_json_atomic

        write_json_atomic(options.json, found.to_json())
        print(f"written: {options.json}")
    return EXIT_DONE


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mgm-exp suggest",
        description="Settings to begin with for a model, a card and a number of rows, each with its reason; and what "
        "full fine-tuning, LoRA and QLoRA need under every stage of ZeRO. Nothing is read, nothing is started.",
    )
    parser.add_argument("--memory", type=float, required=True, metavar="GB", help="of one card, as on its box")
    parser.add_argument(
        "--data", type=count("conversations"), required=True, metavar="N", help="conversations to learn from"
    )
    parser.add_argument("--model", default="mgm_2b", help="a choice of the group model (default: mgm_2b)")
    parser.add_argument("--devices", type=count("cards"), default=1, metavar="N", help="cards (default: 1)")
    parser.add_argument(
        "--text-tokens",
        type=count("tokens"),
        default=124,
        metavar="N",
        help="mean tokens of a sample beside its image's (124)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write it as JSON, too")
    parser.add_argument("overrides", nargs="*", help="what is fixed already, as for a run")
    return parser.parse_intermixed_args(arguments)


def _show(found: Suggestion, given: Sequence[str], options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    for choice in found.choices:
        console.print(Text(choice.override, style="bold"), soft_wrap=True)
        console.print(Text(f"    {choice.reason}"), soft_wrap=True)
    console.print()
    console.print(
        Text(f"peak memory of a process in GiB, of {options.memory:g} GB, with this batch and checkpointing:")
    )
    _show_table(console, found.table, lambda value: f"{value:.1f}")
    console.print()
    console.print(
        Text(
            "at least, with one sample in a pass and gradient checkpointing: peak (of it weights, gradients and "
            "optimizer), GiB:"
        ),
        soft_wrap=True,
    )
    _show_table(console, found.least, lambda value: f"{value.peak:.1f} ({value.state:.1f}) {value.verdict}")
    console.print()
    console.print(Text("python -m mgm_exp " + " ".join([*given, *found.overrides])), soft_wrap=True)


def _show_table(console: Any, rows: Mapping[str, Mapping[str, Any]], in_words: Callable[[Any], str]) -> None:
    """Adapters by ways of sharding; why some do not go together stands below."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for way in next(iter(rows.values())):
        table.add_column(way, justify="right")
    notes = []
    for name, row in rows.items():
        table.add_row(Text(name), *("-" if isinstance(value, str) else in_words(value) for value in row.values()))
        # One is enough: what does not go with one way of sharding says the same of the next
        notes += [f"{name}: {value}" for value in row.values() if isinstance(value, str)][:1]
    console.print(table)
    for note in notes:
        console.print(Text(f"- {note}"), soft_wrap=True)
