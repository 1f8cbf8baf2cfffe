"""``mgm-exp replay RUN``: steps of a run again, compared bit by bit with what it recorded."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from mgm_exp.errors import EXIT_DONE, EXIT_FAILED, UserError
from mgm_exp.signals import stop_on_signals
from mgm_exp.verbs.arguments import check_json
from mgm_exp.verbs.progress_bar import progress_bar

EXIT_DIFFERS = EXIT_FAILED


def run(arguments: list[str]) -> int:
    """Replays what the arguments name; 0 where everything is equal, 1 where something differs."""
    options = _options(arguments)
    check_json(options.json)
    from mgm_exp.replay import Replay, read_run
    from mgm_exp.store import write_json_atomic

    recorded = read_run(options.run, options.overrides)
    with (
        stop_on_signals(),
        tempfile.TemporaryDirectory(prefix="mgm-exp-replay-", dir=_parent(options)) as scratch,
        progress_bar() as on_progress,
    ):
        findings = Replay(
            recorded,
            Path(scratch),
            steps=None if options.steps == 0 else options.steps,
            start=options.start,
            only=options.stage,
            threads=options.threads,
            profile=options.profile.expanduser().resolve() if options.profile else None,
            tell=on_progress,
            say=_say,
        ).run()
    print(findings.in_words())
    if options.json is not None:
        write_json_atomic(options.json, findings.as_json())
    return EXIT_DONE if findings.first is None else EXIT_DIFFERS


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def _parent(options: argparse.Namespace) -> Path | None:
    """Where the scratch folder is made, never inside the run."""
    if options.scratch is None:
        return None
    parent = Path(options.scratch).expanduser().resolve()
    run_folder = Path(options.run).expanduser().resolve()
    if parent == run_folder or run_folder in parent.parents:
        raise UserError(f"--scratch {options.scratch} lies in the run, which a replay never writes to.")
    if not parent.is_dir():
        raise UserError(f"--scratch {options.scratch} is not a folder.")
    return parent


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mgm-exp replay",
        description="Computes steps of a run again, in a scratch folder, and compares loss, gradient norm, learning "
        "rate, tokens and batch of each step with the run's metrics.jsonl bit by bit, and the weights where both have "
        "a checkpoint. Names the first difference, and what changed since: data, settings, model, code, packages, "
        "device. Exit codes: 0 equal, 1 differs, 2 bad input, 130 interrupted.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run that ended, however it ended")
    parser.add_argument(
        "--steps", type=_count, default=10, metavar="N", help="steps of each stage (default: 10; 0: all)"
    )
    parser.add_argument(
        "--from",
        dest="start",
        type=_count,
        default=0,
        metavar="S",
        help="continue the run's checkpoint after step S (default: 0, the beginning)",
    )
    parser.add_argument("--stage", choices=("align", "instruct"), help="only this stage (default: both)")
    parser.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: as many as the run had)")
    parser.add_argument("--scratch", metavar="DIR", help="where to work (default: the system's temporary folder)")
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="DIR",
        help="record steps with PyTorch's profiler there (RUN/profile: mgm-exp doctor RUN reads it)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the findings there")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="what is to be different, such as seed=1, or where files are now: paths.store=DIR, data.path=FILE",
    )
    return parser.parse_intermixed_args(arguments)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or above")
    return int(text)


def _positive(text: str) -> int:
    if _count(text) < 1 or int(text) > 1024:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 1024")
    return int(text)
