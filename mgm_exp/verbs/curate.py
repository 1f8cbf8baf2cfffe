"""``mgm-exp curate [OVERRIDES]``: the stages before training alone, and what became of every row."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgm_exp.errors import EXIT_DONE, UserError
from mgm_exp.signals import stop_on_signals
from mgm_exp.verbs.progress_bar import progress_bar

if TYPE_CHECKING:
    from rich.table import Table

    from mgm_exp.config import ExperimentConfig
    from mgm_exp.preparation import Prepared
    from mgm_exp.store import StageOutput

_OF_THE_STORE = ("MANIFEST.json", "stage.json")
_DESCRIPTION = """\
Runs the recipe alone: checks, recaptions, measures and curates, and says what became of every row. Overrides are those
of python -m mgm_exp; a run of the same data afterwards finds everything done. After an interruption the same command
continues.

  mgm-exp curate data=blip2 data.path=pairs.jsonl data.image_root=pictures data.captioner.path=/models/blip2-opt-2.7b
  mgm-exp curate data.path=pairs.jsonl data.recipe.words_num.min=p5 data.recipe.engine=builtin
"""


def run(arguments: list[str]) -> int:
    """Curates what the overrides describe: exit code 0."""
    options = _options(arguments)
    from mgm_exp.compose import compose
    from mgm_exp.folders import open_store
    from mgm_exp.preflight import check
    from mgm_exp.preparation import Preparation

    config = compose(options.overrides)
    out = options.out or Path(config.paths.root) / "data"
    _check_out(out)
    found = check(config, is_data_only=True)
    store = open_store(config.paths)
    with stop_on_signals(), progress_bar() as tell:

        def produce(stage: str, payload: dict[str, Any], make: Callable[[Path], dict[str, Any]]) -> StageOutput:
            from mgm_exp.stages import key_of

            key = key_of(stage, payload)
            output = store.produce(
                stage, key, make, inputs=payload, on_wait=lambda why: print(f"{stage}: waits, {why}")
            )
            how = f"reused ({output.seconds:.1f} s saved)" if output.reused else f"made in {output.seconds:.1f} s"
            print(f"{stage}: {how}", flush=True)
            return output

        prepared = Preparation(config, found, produce, tell, print).run()
        folder = options.out or out / f"{config.data.name}-{prepared.curated.key[:8]}"
        _keep(config, prepared, folder)
    _show(prepared, folder)
    return EXIT_DONE


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mgm-exp curate", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="GROUP=CHOICE or KEY=VALUE")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="new folder for the result (default: <paths.root>/data/<name>-<key>)"
    )
    return parser.parse_intermixed_args(arguments)


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file.", advice="Give a new folder.")


def _keep(config: ExperimentConfig, prepared: Prepared, folder: Path) -> None:
    """Links the result out of the store, and writes the recipe in Data-Juicer's own form beside it."""
    from mgm_exp.store import hard_link_or_copy, remove_folder

    curated = prepared.curated.path
    if folder.exists() and any(folder.iterdir()):
        if not (folder / "report.json").is_file():
            raise UserError(f"{folder} is there already and holds something else.", advice="Give a new folder.")
        if (folder / "report.json").read_bytes() == (curated / "report.json").read_bytes():
            return
        raise UserError(f"{folder} holds the result of another recipe.", advice="Give a new folder, or remove it.")
    building = folder.with_name(f".{folder.name}.partial")
    if building.exists():
        remove_folder(building)
    building.mkdir(parents=True)
    for path in sorted(curated.iterdir()):
        if path.is_file() and path.name not in _OF_THE_STORE:
            hard_link_or_copy(path, building / path.name)
    if prepared.values is not None:
        from mgm_exp.data import data_juicer

        data_juicer.write_recipe(
            building,
            prepared.values.path / "pairs.jsonl",
            prepared.origins["align"].image_root,
            data_juicer.operators_of(config.data.recipe),
            prepared.curated.meta["align"]["limits"],
        )
    os.rename(building, folder)  # an empty folder gives way


def _show(prepared: Prepared, folder: Path) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for stage in ("align", "instruct"):
        console.print(_waterfall(stage, prepared.curated.meta[stage]))
    for name, what in (
        ("report.html", "what became of the rows, with examples"),
        ("align.jsonl, instruct.jsonl", "the rows that are trained on"),
        ("fates-align.jsonl, fates-instruct.jsonl", "the fate of every row"),
        ("recipe.yaml", "the recipe as Data-Juicer runs it: dj-process --config recipe.yaml"),
    ):
        if all((folder / part).exists() for part in name.split(", ")):
            console.print(f"{folder}/{name}: {what}", markup=False)


def _waterfall(stage: str, found: dict[str, Any]) -> Table:
    """What became of a stage's rows, one step a line."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    title = f"{stage}: {found['rows']:,} rows of {found['file']}, {found['kept']:,} kept"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=Text(title), title_justify="left", title_style="bold")
    table.add_column("step", no_wrap=True)
    for name in ("rows", "dropped", "changed", "added", "left"):
        table.add_column(name, justify="right")
    table.add_column("limit, or why")
    for step in found["waterfall"]:
        counts = [step[key] for key in ("rows_in", "dropped", "changed", "added", "rows_out")]
        why = step.get("limit") or ", ".join(f"{count:,} {kind}" for kind, count in step.get("kinds", {}).items())
        table.add_row(step["step"], *(f"{count:,}" if count else "" for count in counts), Text(why))
    return table
