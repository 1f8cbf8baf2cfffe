"""Is Data-Juicer there, with what it needs without saying so?"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from mgm_exp.errors import MissingDependencyError

VERSION = "1.6.1"
"""The version whose operators, and whose traps, are known here."""

_UNDECLARED = ("aiohttp", "ray")
"""Packages that Data-Juicer imports, or installs by itself at run time, without naming them as dependencies."""


def require_data_juicer() -> str:
    """Its name and version, e.g. for a report.

    Raises:
        MissingDependencyError: it is not installed, in another version, or without a package that it needs.
    """
    try:
        found = version("py-data-juicer")
    except PackageNotFoundError:
        found = None
    missing = [package for package in _UNDECLARED if find_spec(package) is None]
    if found == VERSION and not missing:
        return f"data-juicer {found}"
    if found is None:
        what = "Data-Juicer is not installed."
    elif found != VERSION:
        what = f"Data-Juicer {found} is installed; its operators are known here for {VERSION}."
    else:
        what = f"Data-Juicer needs {', '.join(missing)}, which it does not declare, and which is not installed."
    raise MissingDependencyError(
        what,
        advice=f"Run `pip install py-data-juicer=={VERSION} {' '.join(_UNDECLARED)}` (the extra `data` brings them), "
        "or set data.recipe.engine=builtin and data.captioner.engine=mgm_exp, which need none of it.",
    )
