"""``mgm-exp check DIR``: proves that a merged folder is whole and equal to its base and adapter."""

from __future__ import annotations

import argparse
from pathlib import Path

from mgm_exp.errors import EXIT_DONE, EXIT_FAILED
from mgm_exp.signals import stop_on_signals
from mgm_exp.verbs.arguments import add_base
from mgm_exp.verbs.progress_bar import progress_bar


def run(arguments: list[str]) -> int:
    """Checks what the arguments name: 0 where everything holds, else 1."""
    options = _options(arguments)
    from mgm_exp.model.check import check_merged

    with stop_on_signals(), progress_bar() as on_progress:
        findings = check_merged(
            options.folder,
            run=options.run,
            base=options.base,
            images=options.image,
            device=options.device,
            with_logits=not options.no_logits,
            on_progress=on_progress,
        )
    width = max(len(finding.name) for finding in findings)
    words = {True: "ok", False: "WRONG", None: "not checked"}
    for finding in findings:
        print(f"{finding.name:<{width}}  {words[finding.holds]:<11}  {finding.says}")
        if finding.advice:
            print(f"{'':<{width}}  {'':<11}  {finding.advice}")
    wrong = sum(finding.holds is not True for finding in findings)
    if wrong:
        print(f"{options.folder} is NOT proven: {wrong} of {len(findings)} checks do not hold")
        return EXIT_FAILED
    print(f"{options.folder} is whole, and equal to its base and adapter")
    return EXIT_DONE


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mgm-exp check",
        description="Finds base and adapter through the merge record and compares: files by SHA-256, names, shapes and "
        "dtype, weights, logits on pictures, tokenizer and generation config. Exit code 1 if anything is "
        "wrong.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="written by mgm-exp merge")
    parser.add_argument("--run", type=Path, metavar="RUN", help="where the run is now, if it moved")
    add_base(parser, "where it is now, if it moved")
    parser.add_argument(
        "--image", type=Path, action="append", default=[], metavar="FILE", help="compare logits on it (repeatable)"
    )
    parser.add_argument("--device", default="cpu", help="for the logits: cpu, cuda (default: cpu)")
    parser.add_argument("--no-logits", action="store_true", help="load no model: quick, but not a whole proof")
    return parser.parse_args(arguments)
