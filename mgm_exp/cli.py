"""``mgm-exp VERB``: what one does with experiments besides running one. ``mgm-exp run`` is ``python -m mgm_exp``.

Each verb is a function that takes its arguments and gives an exit code; it imports what it needs when it is called, so
that ``mgm-exp --help`` is instant.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mgm_exp.command import guarded
from mgm_exp.errors import EXIT_DONE, UserError


@dataclass(frozen=True)
class Verb:
    """One verb of the command line."""

    usage: str
    says: str
    run: Callable[[list[str]], int]


def main(argv: Sequence[str] | None = None) -> int:
    """``mgm-exp ARGUMENTS``: the exit code."""
    return guarded(_main, list(sys.argv[1:] if argv is None else argv))


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return EXIT_DONE
    if arguments[0] == "--version":
        from mgm_exp import __version__

        print(f"mgm-exp {__version__}")
        return EXIT_DONE
    verb = VERBS.get(arguments[0])
    if verb is None:
        near = difflib.get_close_matches(arguments[0], VERBS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"mgm-exp has no verb {arguments[0]!r}; there are {', '.join(VERBS)}.{hint}")
    return verb.run(arguments[1:])


def _help() -> str:
    lines = [
        "mgm-exp: fine-tuning experiments on Mini-Gemini (MGM)",
        "",
        "Usage: mgm-exp VERB [ARGUMENTS]        mgm-exp VERB --help says more",
        "",
        *(f"  {verb.usage:<34} {verb.says}" for verb in VERBS.values()),
        "",
        "--debug shows tracebacks. Exit codes: 0 done, 1 a run failed, 2 bad input, 3 does not fit, 130 interrupted.",
    ]
    return "\n".join(lines)


def _run(arguments: list[str]) -> int:
    from mgm_exp.command import run_arguments

    return run_arguments(arguments, program="mgm-exp run")


def _status(arguments: list[str]) -> int:
    parser = _parser("status", "What runs, what is done, what failed and why, from the files of runs and sweeps.")
    parser.add_argument("sweep", nargs="?", help="name or folder of a sweep, or a run's folder (default: all)")
    parser.add_argument("--root", type=Path, default=Path("outputs"), help="paths.root (default: outputs)")
    parser.add_argument("--watch", action="store_true", help="keep the table of one sweep up to date until it ends")
    options = parser.parse_args(arguments)
    from mgm_exp.status import show_status, watch_status

    if options.watch and options.sweep is None:
        raise UserError("mgm-exp status --watch needs the name or folder of a sweep.")
    if options.watch:
        watch_status(options.sweep, options.root)
    else:
        show_status(options.sweep, options.root)
    return EXIT_DONE


def _dashboard(arguments: list[str]) -> int:
    parser = _parser("dashboard", "Opens the study of a search in optuna-dashboard, in the browser of this machine.")
    parser.add_argument("sweep", help="name or folder of a search")
    parser.add_argument("--root", type=Path, default=Path("outputs"), help="paths.root (default: outputs)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8080, help="port (default: 8080)")
    options = parser.parse_args(arguments)
    from mgm_exp.dashboard import show_dashboard

    show_dashboard(options.sweep, options.root, host=options.host, port=options.port)
    return EXIT_DONE


def _study_server(arguments: list[str]) -> int:
    parser = _parser("study-server", "Serves the studies of a database to many trials: sweep.storage=grpc://HOST:PORT.")
    parser.add_argument("database", help="sqlite:///FILE, or postgresql+psycopg://HOST/DATABASE")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=13000, help="port (default: 13000)")
    options = parser.parse_args(arguments)
    from mgm_exp.study_server import serve

    serve(options.database, host=options.host, port=options.port)
    return EXIT_DONE


def _report(arguments: list[str]) -> int:
    from mgm_exp.verbs.report import run

    return run(arguments)


def _wandb_sync(arguments: list[str]) -> int:
    from mgm_exp.verbs.wandb_sync import run

    return run(arguments)


def _gc(arguments: list[str]) -> int:
    parser = _parser("gc", "Drops store entries that nobody used for a while; run folders lose nothing.")
    parser.add_argument("--root", type=Path, default=Path("outputs"), help="paths.root (default: outputs)")
    parser.add_argument("--store", type=Path, help="paths.store, where it is not below the root")
    parser.add_argument("--older-than", type=float, default=7.0, metavar="DAYS", help="unused for so long (default: 7)")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be dropped")
    options = parser.parse_args(arguments)
    from mgm_exp.store import Store

    folder = options.store or options.root / "store"
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder, so there is no store there.", advice="Give --root or --store.")
    dropped = Store(folder).gc(older_than_s=options.older_than * 86_400, dry_run=options.dry_run)
    for item in dropped:
        print(f"{item.size / 2**20:10.1f} MiB  {item.idle_s / 86_400:6.1f} days  {item.kind:<8} {item.path}")
    size = sum(item.size for item in dropped) / 2**20
    print(f"{'would drop' if options.dry_run else 'dropped'} {len(dropped)} item(s), {size:.1f} MiB, from {folder}")
    return EXIT_DONE


def _validate(arguments: list[str]) -> int:
    from mgm_exp.verbs.validate import run

    return run(arguments)


def _explore(arguments: list[str]) -> int:
    from mgm_exp.verbs.explore import run

    return run(arguments)


def _evaluate(arguments: list[str]) -> int:
    from mgm_exp.verbs.evaluate import run

    return run(arguments)


def _ask(arguments: list[str]) -> int:
    from mgm_exp.verbs.ask import run

    return run(arguments)


def _gallery(arguments: list[str]) -> int:
    from mgm_exp.verbs.gallery import run

    return run(arguments)


def _convert(arguments: list[str]) -> int:
    from mgm_exp.verbs.convert import run

    return run(arguments)


def _split(arguments: list[str]) -> int:
    from mgm_exp.verbs.split import run

    return run(arguments)


def _parser(verb: str, says: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"mgm-exp {verb}", description=says)


def _plan(arguments: list[str]) -> int:
    from mgm_exp.verbs.plan import run

    return run(arguments)


def _suggest(arguments: list[str]) -> int:
    from mgm_exp.verbs.suggest import run

    return run(arguments)


def _curate(arguments: list[str]) -> int:
    from mgm_exp.verbs.curate import run

    return run(arguments)


def _launch(arguments: list[str]) -> int:
    from mgm_exp.verbs.launch import run

    return run(arguments)


def _replay(arguments: list[str]) -> int:
    from mgm_exp.verbs.replay import run

    return run(arguments)


def _alert(arguments: list[str]) -> int:
    from mgm_exp.verbs.alert import run

    return run(arguments)


def _doctor(arguments: list[str]) -> int:
    from mgm_exp.verbs.doctor import run

    return run(arguments)


def _monitor(arguments: list[str]) -> int:
    from mgm_exp.verbs.monitor import run

    return run(arguments)


def _merge(arguments: list[str]) -> int:
    from mgm_exp.verbs.merge import run

    return run(arguments)


def _check(arguments: list[str]) -> int:
    from mgm_exp.verbs.check import run

    return run(arguments)


VERBS = {
    "run": Verb("run [OVERRIDES]", "one experiment; -m for a sweep (the same as python -m mgm_exp)", _run),
    "plan": Verb("plan [OVERRIDES] [--explain]", "what it will need and cost, and whether it fits", _plan),
    "suggest": Verb("suggest --memory GB --data N", "settings to begin with, each with its reason", _suggest),
    "launch": Verb(
        "launch [--dry-run] [OVERRIDES]", "a sweep on a cluster; --dry-run shows scripts, manifests", _launch
    ),
    "status": Verb("status [SWEEP] [--watch]", "what runs, what is done, what failed and why", _status),
    "doctor": Verb("doctor RUN|LOG|TEXT", "what went wrong, and what to do; two runs: where they part", _doctor),
    "monitor": Verb("monitor RUN | --write DIR", "what a run took of its machine; files for Prometheus", _monitor),
    "alert": Verb("alert --test [overrides]", "a test message to every address of alerts.urls: who took it?", _alert),
    "dashboard": Verb("dashboard SWEEP [--port N]", "the study of a search in optuna-dashboard", _dashboard),
    "study-server": Verb(
        "study-server DATABASE [--port N]", "one process between a database and many trials", _study_server
    ),
    "report": Verb("report DIR... [--out FILE]", "compare runs or sweeps: page, JSON, Markdown, LaTeX, CSV", _report),
    "evaluate": Verb(
        "evaluate RUN --benchmarks A,B", "more scores for a finished run; with --out DIR for a checkpoint", _evaluate
    ),
    "gallery": Verb("gallery RUN [--type T]", "what a run answered wrong, by type of question, with images", _gallery),
    "ask": Verb("ask RUN IMAGE QUESTION", "what a trained model answers about an image", _ask),
    "wandb-sync": Verb("wandb-sync DIR...", "send runs to W&B that were made offline or cut short", _wandb_sync),
    "curate": Verb("curate [OVERRIDES]", "run the data recipe alone: what became of every row", _curate),
    "explore": Verb("explore PATH [PATH]", "what a dataset is like: report, plots, JSON; two: compared", _explore),
    "validate": Verb("validate PATH [--fix DIR]", "every broken row and image with its place; a clean copy", _validate),
    "convert": Verb("convert IN OUT --to FORMAT", "the same rows in another format, without loss", _convert),
    "split": Verb("split PATH --out DIR", "train, validation and test parts; no image in two of them", _split),
    "merge": Verb("merge RUN --out DIR", "a trained model as one standalone folder, with its card", _merge),
    "check": Verb("check DIR", "proves a merged folder equal to its base and adapter", _check),
    "replay": Verb("replay RUN [--steps N --from S]", "steps of a run again, compared bit by bit", _replay),
    "gc": Verb("gc [--dry-run] [--older-than D]", "drop unused store entries", _gc),
}

if __name__ == "__main__":
    sys.exit(main())
