"""``mgm-exp doctor RUN|LOG|"error text"``: what went wrong, and what to do; two runs: where they part."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from mgm_exp.errors import EXIT_DONE, EXIT_FAILED, UserError

# Something was found, or two runs part.
EXIT_FOUND = EXIT_FAILED
# What is read of a text that is piped in.
MOST_PIPED = 4 << 20


def run(arguments: list[str]) -> int:
    """Looks at what the arguments name; 0 where nothing is wrong, 1 where something is."""
    options = _options(arguments)
    from mgm_exp import doctor

    if options.list:
        print(doctor.list_in_words(doctor.entries()))
        return EXIT_DONE
    if options.entry is not None:
        known = doctor.entry(options.entry)
        print(doctor.entry_in_words(known))
        _write(options.json, {"schema_version": 1, "entries": [known.as_json()]})
        return EXIT_DONE
    if options.search is not None:
        found = doctor.search(options.search)
        print(doctor.list_in_words(found) if found else f"no entry holds {options.search!r}")
        _write(options.json, {"schema_version": 1, "entries": [known.as_json() for known in found]})
        return EXIT_DONE if found else EXIT_FOUND
    return _examine(options)


def _examine(options: argparse.Namespace) -> int:
    from mgm_exp import doctor

    given = options.what
    if not given:
        raise UserError("mgm-exp doctor needs a run, a log or an error text.", advice="--list shows what is known.")
    places = [_place(text, options.root) for text in given]
    runs = [place for place in places if place is not None and place.is_dir()]
    if len(given) == 2 and len(runs) == 2:
        compared = doctor.compare_runs(*runs)
        print(compared.in_words())
        _write(options.json, compared.as_json())
        return EXIT_FOUND if compared.has_parted else EXIT_DONE
    if len(given) > 1:
        raise UserError(
            f"{len(given)} arguments were given; one run, log or text is examined, or two run folders are compared.",
            advice="Put an error text into quotes.",
        )
    place = places[0]
    if place is not None and place.is_dir() and doctor.is_sweep(place):
        swept = doctor.diagnose_sweep(place)
        print(swept.in_words())
        _write(options.json, swept.as_json())
        return EXIT_DONE if swept.is_well else EXIT_FOUND
    found = doctor.diagnose(_case(given[0], place))
    if place is None and found.is_well and _is_word(given[0]):
        raise UserError(
            f"There is no file, run or sweep {given[0]}, and it is no error that is known.",
            advice="Give outputs/runs/NAME/TIME, the name of a sweep, a log file, or the error's text in quotes.",
        )
    print(doctor.in_words(found))
    _write(options.json, found.as_json())
    return EXIT_DONE if found.is_well else EXIT_FOUND


def _case(given: str, place: Path | None) -> Any:
    from mgm_exp import doctor

    if given == "-":
        return doctor.case_of_text(sys.stdin.buffer.read(MOST_PIPED).decode("utf-8", "replace"), "standard input")
    if place is None:
        return doctor.case_of_text(given)
    if place.is_dir():
        if not doctor.is_run(place):
            raise UserError(
                f"{place} is neither a run's folder nor a sweep's.",
                advice="Give outputs/runs/NAME/TIME, outputs/sweeps/NAME, a log file, or the error's text in quotes.",
            )
        return doctor.case_of_run(place)
    return doctor.case_of_log(place)


def _place(text: str, root: Path) -> Path | None:
    """The file or folder that is meant; None: it is an error's text.

    Raises:
        UserError: it looks like a path, and nothing is there.
    """
    try:
        for place in (Path(text).expanduser(), root / "sweeps" / text):
            if text != "-" and place.exists():
                return place
    except (OSError, ValueError, RuntimeError):  # too long, or holds what no path may: a text
        return None
    if _is_word(text) and ("/" in text or text.endswith((".txt", ".log"))):
        raise UserError(f"There is no {text}.", advice="Give a run's folder, a log, or an error's text in quotes.")
    return None


def _is_word(text: str) -> bool:
    """Whether it may be a name, rather than an error's text."""
    return text != "-" and not any(mark in text for mark in " \n:([")


def _write(path: Path | None, content: dict[str, Any]) -> None:
    from mgm_exp.store import write_json_atomic

    if path is not None:
        write_json_atomic(path, content)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mgm-exp doctor",
        description="Says what most likely went wrong with a run, a sweep, a log or an error's text, with the lines "
        "and numbers that show it, and what to do. Two run folders: where their curves part, and why. Exit codes: 0 "
        "nothing is wrong (two runs do not part), 1 something is, 2 bad input.",
    )
    parser.add_argument(
        "what", nargs="*", metavar="RUN|SWEEP|LOG|TEXT", help="a folder, a log file, an error's text in quotes, or -"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there")
    parser.add_argument("--search", metavar="WORDS", help="entries of the knowledge base that hold all these words")
    parser.add_argument("--list", action="store_true", help="all entries of the knowledge base")
    parser.add_argument("--entry", metavar="ID", help="one entry in full")
    parser.add_argument("--root", type=Path, default=Path("outputs"), help="paths.root, for names of sweeps")
    return parser.parse_args(arguments)
