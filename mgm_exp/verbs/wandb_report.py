"""``mgm-exp report DIR... --wandb``: the comparison as a W&B Report, written anew by the next call."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgm_exp.errors import MgmError, UserError
from mgm_exp.store import read_yaml

if TYPE_CHECKING:
    from mgm_exp.compare import Run

RECORD = "wandb_report.json"
"""Which report belongs to a comparison; beside ``comparison.json``."""


def save(comparison: Mapping[str, Any], runs: Sequence[Run], folder: Path, asked: str) -> str:
    """Saves the report. Returns its address.

    Args:
        comparison: What was found.
        runs: The runs that it was made of; they should be in W&B (``mgm-exp wandb-sync``).
        folder: Where ``comparison.json`` lies.
        asked: ``PROJECT`` or ``ENTITY/PROJECT``; empty: what the runs' configuration says.

    Raises:
        UserError: no project is known, or there is no key.
        MgmError: W&B did not take it.
    """
    from mgm_exp.compare.wandb_report import Place, save_report, wandb_report
    from mgm_exp.record.wandb_client import first_line, has_key, refuse_key_for, run_id
    from mgm_exp.store import read_json, write_json_atomic

    entity, project, base_url = _place(runs, asked)
    refuse_key_for(base_url)
    if base_url and not os.environ.get("WANDB_BASE_URL"):
        os.environ["WANDB_BASE_URL"] = base_url
    os.environ.setdefault("WANDB_SILENT", "true")
    if not has_key(base_url):
        raise UserError(
            "There is no W&B key, so no W&B report can be saved; the files are written.",
            advice="Set WANDB_API_KEY, or put the key into netrc with `wandb login`.",
        )
    record = folder / RECORD
    before = read_json(record) if record.is_file() else {}
    known = before.get("id", "") if (before.get("entity"), before.get("project")) == (entity, project) else ""
    ids = [run_id(str(run.manifest["run_id"])) for run in runs if run.manifest.get("run_id")]
    title = f"{folder.resolve().name}, {len(runs)} runs compared"
    try:
        report = wandb_report(comparison, runs, title, Place(project, entity, ids, known))
        url, report_id = save_report(report)
    except MgmError:
        raise
    except Exception as error:
        advice = f"If that report was deleted in W&B, delete {record}." if known else "The files are written."
        raise MgmError(f"W&B did not take the report ({first_line(error)}).", advice=advice) from error
    write_json_atomic(record, {"entity": entity, "project": project, "id": report_id, "url": url})
    return url


def _place(runs: Sequence[Run], asked: str) -> tuple[str | None, str, str | None]:
    """Entity, project and server: what was asked for, else what the first run with a configuration says."""
    tracker: dict[str, Any] = {}
    for run in runs:
        try:
            found = read_yaml(run.path / "config.yaml")
        except (OSError, ValueError):
            continue
        if isinstance(found, dict) and isinstance(found.get("tracker"), dict):
            tracker = found["tracker"]
            break
    entity, slash, project = asked.rpartition("/")
    project = project or str(tracker.get("project") or "")
    if not project or (slash and not entity):
        raise UserError(
            f"--wandb {asked}: there is no project to put the report into.", advice="Give --wandb [ENTITY/]PROJECT."
        )
    return entity or tracker.get("entity"), project, tracker.get("base_url")
