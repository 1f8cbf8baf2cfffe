"""What a run says of itself when it has failed: the likeliest cause, found from the ends of its files.

It must neither take long nor hide the error: whatever goes wrong here, the error is recorded as it was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mgm_exp.doctor.case import case_of_run
from mgm_exp.doctor.diagnosis import LIKELY, Finding, diagnose, summary_of
from mgm_exp.doctor.reading import OWN_WORDS

log = logging.getLogger(__name__)


def explained_error(
    error: Mapping[str, Any], run_dir: Path, say: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """The ``error`` of ``result.json`` with what the doctor makes of it, under ``doctor``; else as it was.

    Args:
        error: ``type``, ``message``, ``cause``, ``advice``.
        run_dir: The run's folder, everything but ``result.json`` written.
        say: Is told the cause and its fix, a line each; None: nobody is.
    """
    try:
        found = diagnose(case_of_run(run_dir, quick=True, error=error)).findings
        finding = next((item for item in found if item.entry.severity == "fatal" and item.confidence >= LIKELY), None)
        if finding is None:
            return dict(error)
        if say is not None:
            for line in words_of(finding, run_dir):
                say(line)
        return {**error, "doctor": dict(summary_of(finding))}
    except Exception as trouble:  # noqa: BLE001 - the run's own error is what counts, whatever happens here
        log.warning("doctor: no diagnosis (%s: %s)", type(trouble).__name__, trouble)
        return dict(error)


def words_of(finding: Finding, run_dir: Path) -> list[str]:
    """The cause and its first fix, in lines that are not read as symptoms later."""
    entry = finding.entry
    lines = [f"{entry.title} ({finding.how_sure}): {entry.cause}", f"what to do: {entry.fix[0]}"]
    lines.append(f"all that was found: mgm-exp doctor {run_dir}")
    return [OWN_WORDS + line for line in lines]
