"""``mgm-exp dashboard SWEEP``: the study of a search in optuna-dashboard (an extra)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from mgm_exp.errors import MissingDependencyError, UserError
from mgm_exp.search.study import open_storage, storage_place
from mgm_exp.status import find, is_search
from mgm_exp.store import read_yaml
from mgm_exp.study_books import run_dirs


def show_dashboard(sweep: str, root: Path, *, host: str, port: int) -> None:
    """Serves the study until Ctrl-C.

    Args:
        sweep: Name or folder of a search.
        root: ``paths.root``.
        host, port: Where to listen.

    Raises:
        UserError: there is no such search, or the port is taken.
        MissingDependencyError: optuna-dashboard is not installed.
    """
    storage = study_storage(sweep, root)
    if importlib.util.find_spec("optuna_dashboard") is None:
        raise MissingDependencyError(
            "optuna-dashboard is not installed.",
            advice="pip install 'mgm-exp[search]'; the charts in the sweep's folder (history.svg, ...) need nothing.",
        )
    from optuna_dashboard import run_server

    print(f"http://{host}:{port}/  (Ctrl-C ends it)", flush=True)
    try:
        run_server(storage, host=host, port=port)
    except OSError as error:
        raise UserError(f"{host}:{port} cannot be listened on ({error.strerror}).", advice="Give --port.") from error


def study_storage(sweep: str, root: Path) -> Any:
    """The storage of a search's study.

    Raises:
        UserError: there is no such search, or it is a grid.
    """
    folder = find(sweep, root).resolve()
    if not is_search(folder):
        raise UserError(f"{folder} is a grid, which has no study; mgm-exp report compares its runs.")
    return open_storage(storage_place(_wanted(folder), folder))


def _wanted(folder: Path) -> str | None:
    """``sweep.storage`` of the search, from the configuration of one of its trials."""
    for trial in sorted(path for path in folder.iterdir() if path.name.isdigit()):
        for run in run_dirs(trial):
            try:
                values = read_yaml(run / "config.yaml")
                return values["sweep"]["storage"]
            except (OSError, ValueError, KeyError, TypeError):
                continue
    return None
