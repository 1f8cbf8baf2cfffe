"""``mgm-exp evaluate RUN --benchmarks a,b``: more scores for a model that is there already."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mgm_exp.errors import EXIT_DONE, UserError
from mgm_exp.signals import stop_on_signals
from mgm_exp.verbs.arguments import add_base
from mgm_exp.verbs.progress_bar import progress_bar


def run(arguments: list[str]) -> int:
    """Scores what the arguments name and prints the table."""
    options = _options(arguments)
    from mgm_exp import evaluate
    from mgm_exp.evaluation import Evaluation
    from mgm_exp.trained import find_trained

    with stop_on_signals():
        trained = find_trained(options.model, options.benchmarks, options.overrides, options.base)
        if not trained.is_run and options.out is None:
            raise UserError(f"{options.model} is a checkpoint, not a run.", advice="Say with --out where to write.")
        if options.out is not None and options.out.exists() and not options.out.is_dir():
            raise UserError(f"--out {options.out} is a file; give a folder.")
        with progress_bar() as on_progress:
            lines = Evaluation(trained, options.out or trained.folder, on_progress, _say).run()
    print(evaluate.render(lines))
    return EXIT_DONE


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mgm-exp evaluate",
        description="Scores benchmarks on the model of a finished run and adds them to its result.json, "
        "benchmarks.json and predictions/; or on a checkpoint folder, with --out. What was scored before is taken from "
        "the store, and a stopped evaluation continues.",
    )
    parser.add_argument("model", type=Path, metavar="RUN", help="run folder, or folder of an MGM checkpoint or a LoRA")
    parser.add_argument(
        "--benchmarks", type=_names, metavar="A,B", help="names, with commas (default: those the run was made with)"
    )
    add_base(parser, "of an adapter folder that names none which is here")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write there and leave RUN as it is")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="where files are and how questions are asked, such as eval.textvqa.questions=FILE, "
        "eval.max_questions=100, device=cpu; of a checkpoint also model=mgm_2b, train.precision=bf16",
    )
    return parser.parse_intermixed_args(arguments)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.strip("[]").split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of names with commas between them")
    return names
