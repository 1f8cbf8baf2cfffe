"""The process of a pack: ``python -m mgm_exp.packed.process DESCRIPTOR [CONFIG_DIR]``, its orders on standard input.

The order is one JSON line, ``[{"number", "run_dir", "arguments"}, ...]``. Runs that cannot train together with another
one are run in turn. As each run ends, its number and exit code go to the descriptor, a JSON line each.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mgm_exp.config import ExperimentConfig
from mgm_exp.errors import EXIT_DONE, EXIT_INTERRUPTED, Interrupted
from mgm_exp.signals import heed_from_the_start

Say = Callable[[str], None]


@dataclass(frozen=True)
class Ordered:
    """A run of the order."""

    number: int
    run_dir: Path
    arguments: tuple[str, ...]


@dataclass
class Composed:
    """Stands in for the experiment while a run is composed: remembers what it would have been given."""

    found: list[Any] = field(default_factory=list)

    def __call__(
        self, config: ExperimentConfig, run_dir: Path, *, command: list[str], overrides: list[str], sweep: str | None
    ) -> dict[str, Any]:
        from mgm_exp.packed.stories import Run

        self.found.append(Run(config, Path(run_dir).resolve(), command, overrides, sweep))
        return {}


def run_orders(orders: Sequence[Ordered], tell: Callable[[int, int], None], say: Say, config_dir: str | None) -> int:
    """Runs them: packs of those that go together, the others in turn; the exit code.

    Args:
        tell: Called with number and exit code of each run as it ends.
        say: Prints a line.
    """
    from mgm_exp.packed.fit import packs_of
    from mgm_exp.packed.stories import Stories, printing_to, told_failure
    from mgm_exp.signals import stop_on_signals

    is_stopped = False
    numbers: dict[Path, int] = {}
    runs = []
    try:
        with stop_on_signals():
            for order in orders:
                try:
                    with printing_to(order.run_dir):
                        run = _composed(order, config_dir)
                except Interrupted:
                    raise
                except Exception as error:  # noqa: BLE001 - this run is refused; the others go on
                    with printing_to(order.run_dir):
                        code = told_failure(error)
                    tell(order.number, code)
                    continue
                numbers[run.run_dir] = order.number
                runs.append(run)
            for pack in packs_of(runs, say):
                stories = Stories(pack.runs, lambda run, code: tell(numbers[run.run_dir], code), say, pack.width)
                stories.is_stopped = is_stopped
                stories.tell()
                is_stopped = stories.is_stopped
    except Interrupted:
        return EXIT_INTERRUPTED
    return EXIT_INTERRUPTED if is_stopped else EXIT_DONE


def _composed(order: Ordered, config_dir: str | None) -> Any:
    from mgm_exp.command import run_once

    composed = Composed()
    run_once(
        list(order.arguments),
        config_dir=config_dir,
        command=["python", "-m", "mgm_exp", *order.arguments],
        task=composed,
    )
    return composed.found[0]


def main(arguments: Sequence[str]) -> int:
    """See the module."""
    from mgm_exp import bootstrap
    from mgm_exp.store import die_with_parent
    from mgm_exp.warm.kept import keep

    die_with_parent(parent_pid=int(os.environ.pop(bootstrap.PARENT)))
    bootstrap.offline()
    keep()  # the base that trials were trained on is also that of their evaluations
    descriptor = int(arguments[0])
    os.set_inheritable(descriptor, False)  # not for processes that a run starts
    orders = [
        Ordered(int(one["number"]), Path(one["run_dir"]), tuple(one["arguments"])) for one in json.load(sys.stdin)
    ]

    def tell(number: int, code: int) -> None:
        os.write(descriptor, json.dumps({"number": number, "exit_code": code}).encode() + b"\n")

    output = sys.stdout

    def say(line: str) -> None:
        print(line, file=output, flush=True)  # not into the log of the run that is told just then

    return run_orders(orders, tell, say, arguments[1] if len(arguments) > 1 else None)


if __name__ == "__main__":
    heed_from_the_start()
    sys.exit(main(sys.argv[1:]))
