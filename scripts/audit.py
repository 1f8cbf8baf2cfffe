"""Whether what is declared, pinned or installed may be a version with a known weakness. Needs no network.

    python scripts/audit.py            every finding on a line of its own; exit code 1 if there is one

``advisories.json`` holds weaknesses of packages that this project depends on, and that matter to how it uses them. It
is kept by hand and never complete: ``make audit-online`` asks a current database.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]


class Advisory(NamedTuple):
    """Versions of a package that have a weakness."""

    package: str
    versions: SpecifierSet
    id: str
    what: str


def normalized(name: str) -> str:
    """A package's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def advisories() -> dict[str, list[Advisory]]:
    """By package."""
    found: dict[str, list[Advisory]] = {}
    for row in json.loads((ROOT / "scripts" / "advisories.json").read_text(encoding="utf-8")):
        advisory = Advisory(normalized(row["package"]), SpecifierSet(row["versions"]), row["id"], row["what"])
        found.setdefault(advisory.package, []).append(advisory)
    return found


def declared(text: str) -> list[Requirement]:
    """The requirements of a pyproject.toml: its dependencies, extras and what builds it."""
    content = tomllib.loads(text)
    project = content.get("project", {})
    lists = [content.get("build-system", {}).get("requires", []), project.get("dependencies", [])]
    return [Requirement(item) for part in (*lists, *project.get("optional-dependencies", {}).values()) for item in part]


def allows(requirement: SpecifierSet, advisory: SpecifierSet) -> Version | None:
    """A version with the weakness that the requirement allows; None: it excludes all of them.

    Looked at are the ends of both ranges: where two ranges meet, one of their ends lies in both.
    """
    ends = {Version(part.version.rstrip(".*")) for part in [*requirement, *advisory]} | {Version("0")}
    both = [end for end in sorted(ends) if requirement.contains(end, prereleases=True) and advisory.contains(end)]
    return both[0] if both else None


def findings() -> Iterator[str]:
    """Every version with a known weakness that is allowed, pinned or installed."""
    known = advisories()
    for requirement in declared((ROOT / "pyproject.toml").read_text(encoding="utf-8")):
        for advisory in known.get(normalized(requirement.name), []):
            version = allows(requirement.specifier, advisory.versions)
            if version is not None:
                yield f"pyproject.toml allows {_says(advisory, version)}: raise the lower bound of {requirement}"
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        name, equals, version_text = line.partition("==")
        if equals and not line.startswith("#"):
            yield from _one("constraints.txt pins", name, version_text.split(";")[0].strip(), known)
    for distribution in metadata.distributions():
        if distribution.metadata["Name"]:
            yield from _one("installed is", distribution.metadata["Name"], distribution.version, known)


def _one(where: str, name: str, version: str, known: dict[str, list[Advisory]]) -> Iterator[str]:
    for advisory in known.get(normalized(name), []):
        if advisory.versions.contains(version, prereleases=True):
            yield f"{where} {_says(advisory, Version(version))}"


def _says(advisory: Advisory, version: Version) -> str:
    return f"{advisory.package} {version} ({advisory.id}: {advisory.what})"


if __name__ == "__main__":
    lines = list(findings())
    print(
        "\n".join(lines)
        if lines
        else f"no known weakness in what is declared, pinned and installed ({len(advisories())} packages looked at)"
    )
    sys.exit(1 if lines else 0)
