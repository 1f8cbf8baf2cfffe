"""``mgm-exp evaluate RUN... --benchmarks a,b``: more scores for models that are there already."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from pathlib import Path

from mgm_exp.errors import EXIT_DONE, ConfigError, Interrupted, UserError
from mgm_exp.signals import stop_on_signals
from mgm_exp.verbs.arguments import add_base
from mgm_exp.verbs.progress_bar import progress_bar

_OVERRIDE = re.compile(r"[+~]{0,2}[\w.@/]+=.*", re.DOTALL)


def run(arguments: list[str]) -> int:
    """Scores what the arguments name and prints the table."""
    options = _options(arguments)
    try:
        with stop_on_signals():
            return _evaluate(options)
    except (Interrupted, KeyboardInterrupt) as error:
        raise Interrupted(
            "Stopped; what was answered is kept.",
            advice=f"Go on with: mgm-exp evaluate {shlex.join(arguments)}",
        ) from error


def _evaluate(options: argparse.Namespace) -> int:
    from mgm_exp import evaluate
    from mgm_exp.evaluation import Evaluation
    from mgm_exp.evaluations import Evaluations
    from mgm_exp.trained import find_trained

    models = [Path(name) for name in options.models if not _is_override(name)]
    overrides = [name for name in options.models if _is_override(name)]
    _check(models, options)
    found = [find_trained(path, options.benchmarks, overrides, options.base, options.devices) for path in models]
    folders = [trained.folder for trained in found]
    for place, trained in enumerate(found):
        if not trained.is_run and options.out is None:
            raise UserError(f"{models[place]} is a checkpoint, not a run.", advice="Say with --out where to write.")
        if trained.folder in folders[:place]:
            raise UserError(f"{models[place]} is named twice; once is enough.")
    with progress_bar("questions") as on_progress:
        if len(found) == 1:
            lines = [Evaluation(found[0], options.out or folders[0], on_progress, _say).run()]
        else:
            names = ["/".join(folder.parts[-2:]) for folder in folders]
            each = [
                Evaluation(trained, trained.folder, on_progress, _say, name)
                for trained, name in zip(found, names, strict=True)
            ]
            lines = Evaluations(each, on_progress, _say).run()
    for folder, table in zip(folders, lines, strict=True):
        if len(found) > 1:
            print(f"{folder}")
        print(evaluate.render(table))
    return EXIT_DONE


def _check(models: list[Path], options: argparse.Namespace) -> None:
    if not models:
        raise ConfigError("mgm-exp evaluate needs a run folder, or the folder of an MGM checkpoint.")
    if options.devices < 1:
        raise ConfigError(f"--devices {options.devices} was given; allowed is 1 or more processes.")
    if len(models) > 1 and options.out is not None:
        raise UserError(
            f"--out {options.out} takes the scores of one model, and {len(models)} are given.",
            advice="Leave --out away: each run's scores go into its own folder.",
        )
    if options.out is not None and options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out {options.out} is a file; give a folder.")


def _is_override(text: str) -> bool:
    """Whether an argument is KEY=VALUE; a folder may have such a name, too."""
    return bool(_OVERRIDE.fullmatch(text)) and not Path(text).is_dir()


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mgm-exp evaluate",
        description="Scores benchmarks on the models of finished runs and adds them to their result.json, "
        "benchmarks.json and predictions/; or on a checkpoint folder, with --out. Adapters of one base are asked in "
        "one pass. What was scored before is taken from the store, and a stopped evaluation continues.",
    )
    parser.add_argument(
        "models",
        nargs="+",
        metavar="RUN|KEY=VALUE",
        help="run folders, or the folder of a checkpoint (MGM, or a model of transformers) or of an adapter; and where "
        "files are and how questions are asked, such as eval.textvqa.questions=FILE, eval.max_questions=100, "
        "device=cpu; of a checkpoint also "
        "model=mgm_2b, train.precision=bf16",
    )
    parser.add_argument(
        "--benchmarks", type=_names, metavar="A,B", help="names, with commas (default: those the run was made with)"
    )
    add_base(parser, "of an adapter folder that names none which is here")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write there and leave RUN as it is")
    parser.add_argument(
        "--devices", type=int, default=1, metavar="N", help="processes that share the questions, one a GPU (default: 1)"
    )
    return parser.parse_intermixed_args(arguments)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.strip("[]").split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of names with commas between them")
    return names
