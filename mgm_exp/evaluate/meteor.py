"""METEOR 1.5 by its authors' own program: needs Java, and the package pycocoevalcap, which brings the program along."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from mgm_exp.errors import MgmError, MissingDependencyError

_TIMEOUT_S = 1800.0


def require_meteor() -> tuple[str, Path]:
    """Paths of Java and of the program.

    Raises:
        MissingDependencyError: one of them is not there.
    """
    java = shutil.which("java")
    found = importlib.util.find_spec("pycocoevalcap")
    folders = [Path(folder) for folder in (found.submodule_search_locations or [])] if found else []
    jar = next((path for folder in folders if (path := folder / "meteor" / "meteor-1.5.jar").is_file()), None)
    if java is None or jar is None:
        lacking = " and ".join(
            name for name, path in (("Java", java), ("the package pycocoevalcap", jar)) if path is None
        )
        raise MissingDependencyError(
            f"eval.captions.meteor=true needs {lacking}, which cannot be found here.",
            advice="Install a Java runtime (8 or above) and pip install 'mgm-exp[metrics-java]', or leave METEOR out.",
        )
    return java, jar


def meteor(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """METEOR 1.5 of a corpus, 0..1 (English, normalised), as pycocoevalcap computes it.

    Args:
        predictions: One tokenised caption for each image.
        references: Tokenised references of each image.

    Raises:
        MissingDependencyError: see :func:`require_meteor`.
        MgmError: the program failed.

    Source: Denkowski and Lavie 2014.
    """
    scores = [
        " ||| ".join(("SCORE", *map(_plain, texts), _plain(text)))
        for text, texts in zip(predictions, references, strict=True)
    ]
    # The program is asked twice: for the statistics of every caption, then for the score that they make together.
    statistics = _run(scores)
    if len(statistics) != len(scores):
        raise MgmError(f"METEOR gave {len(statistics)} lines of statistics for {len(scores)} captions.")
    results = _run([" ||| ".join(("EVAL", *statistics))])
    return float(results[-1])


def _plain(text: str) -> str:
    return " ".join(text.replace("|||", "").split())


def _run(lines: Sequence[str]) -> list[str]:
    java, jar = require_meteor()
    # The program ends by itself when its input ends, so it does not outlive this process.
    command = [java, "-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    done = subprocess.run(
        command,
        input="".join(f"{line}\n" for line in lines),
        capture_output=True,
        encoding="utf-8",
        cwd=jar.parent,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
        timeout=_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise MgmError(f"METEOR ended with code {done.returncode}: {done.stderr.strip()[-500:]}")
    return [line for line in done.stdout.splitlines() if line.strip()]
