"""The house rules that can be checked: who imports whom, what is cheap to import, what no file may hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mgm_exp.record import redact_text

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mgm_exp"

# Room -> the rooms it may import. The faces of the package (experiment.py, command.py, cli.py, ...) may import all.
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "signals": set(),
    "config": set(),
    "store": set(),
    "page": set(),
    "data": {"config", "store", "page"},
    "model": {"config", "store"},
    "train": {"config", "store", "data", "model", "evaluate"},
    "evaluate": {"config", "store", "page", "data", "model"},
    "record": {"config", "store"},
    "compare": {"config", "store", "page"},
    "search": {"config", "store", "record"},
    "doctor": {"config", "store", "record"},
    "plan": {"config", "model", "store"},
    "monitor": {"config", "store", "record"},
    "alerts": {"config", "store", "record", "compare", "doctor", "monitor"},
    "volcano": {"config", "store", "record"},
    "slurm": {"config", "store", "record", "bootstrap"},
}
# Folders of the package's faces.
FACES = {"campaign", "packed", "verbs", "warm"}
# Nouns that belong to every room.
COMMON = {"errors", "signals"}
HEAVY = ("torch", "transformers", "peft", "deepspeed", "wandb", "accelerate", "optuna", "submitit", "ray")
# Rooms in which nothing at all may import torch.
WITHOUT_TORCH = ("config", "errors.py", "store", "compare", "doctor", "monitor", "alerts")


def sources(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def imports(path: Path, *, is_top_level_only: bool = False) -> Iterator[tuple[str, str, int]]:
    """(module, name or "", line) of every import of a file; relative ones are made absolute."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in _top_level(tree) if is_top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "", node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                package = path.relative_to(ROOT).parts[: -node.level]
                module = ".".join([*package, module]).rstrip(".")
            yield from ((module, alias.name, node.lineno) for alias in node.names)


def _top_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run on import: not those of functions, nor those for type checkers."""
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            pending += node.orelse
            continue
        yield node
        for field in ("body", "orelse", "finalbody"):
            pending += [child for child in getattr(node, field, []) if isinstance(child, ast.stmt)]
        pending += [child for handler in getattr(node, "handlers", []) for child in handler.body]


def room_of(module: str) -> str | None:
    """``mgm_exp.data.records`` is in ``data``; None for what is no room of ours."""
    parts = module.split(".")
    return parts[1] if parts[0] == "mgm_exp" and len(parts) > 1 else None


def rooms_imported(path: Path) -> Iterator[tuple[str, int]]:
    for module, name, line in imports(path):
        room = name if module == "mgm_exp" else room_of(module)
        if room:
            yield room, line


def test_every_room_has_its_rule() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders <= set(ROOMS) | FACES


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_imports_only_rooms_below_it(room: str) -> None:
    place = PACKAGE / room
    files = sources(place) if place.is_dir() else [place.with_suffix(".py")]
    assert files
    allowed = ROOMS[room] | COMMON | {room}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {found}"
        for path in files
        for found, line in rooms_imported(path)
        if found not in allowed
    ]
    assert wrong == []


def test_nobody_reaches_into_private_names_of_another_room() -> None:
    wrong = []
    for path in sources(PACKAGE, ROOT / "launcher"):
        own = path.relative_to(ROOT).parts[1].removesuffix(".py") if path.is_relative_to(PACKAGE) else ""
        for module, name, line in imports(path):
            room = room_of(module)
            private = [part for part in [*module.split(".")[1:], name] if part.startswith("_") and part[1:2] != "_"]
            if room and room != own and private:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}.{name}")
    assert wrong == []


def test_plugins_import_no_heavy_package_when_hydra_scans_them() -> None:
    """Every Hydra program of an environment imports them."""
    files = sources(ROOT / "launcher")
    assert files
    wrong = [
        f"{path.name}:{line} imports {module}"
        for path in files
        for module, _, line in imports(path, is_top_level_only=True)
        if module.partition(".")[0] in HEAVY
    ]
    assert wrong == []


@pytest.mark.parametrize("place", WITHOUT_TORCH)
def test_rooms_of_plain_files_never_import_torch(place: str) -> None:
    path = PACKAGE / place
    files = sources(path) if path.is_dir() else [path]
    assert files
    assert [f for f in files for module, _, _ in imports(f) if module.partition(".")[0] in HEAVY] == []


def loaded_after(program: list[str]) -> set[str]:
    """The top-level packages that a Python command imports."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.findall(r"^import time:.*\|\s+([\w.]+)$", done.stderr, re.MULTILINE)
    assert "argparse" in found or "mgm_exp" in found
    return {name.partition(".")[0] for name in found}


MODULES = "mgm_exp mgm_exp.config mgm_exp.store mgm_exp.cli mgm_exp.record mgm_exp.compare mgm_exp.command".split()
PACKAGES = "mgm_exp.train mgm_exp.evaluate mgm_exp.data mgm_exp.search mgm_exp.plan mgm_exp.doctor".split()


@pytest.mark.parametrize(
    "program",
    [
        ["-c", f"import {', '.join(MODULES + PACKAGES)}"],
        ["-m", "mgm_exp", "--help"],
        ["-m", "mgm_exp.cli", "--help"],
        ["-m", "mgm_exp", "--cfg", "job", "adapter=lora_r16", "zero=2"],
    ],
    ids=["import", "help", "cli-help", "compose"],
)
def test_importing_composing_and_helping_are_cheap(program: list[str]) -> None:
    assert loaded_after(program) & set(HEAVY) == set()


# Written in parts, so that this file passes its own test.
FORBIDDEN = {
    "a path of somebody's machine": re.compile(
        r"/wo" r"rk/|/tmp/d" r"ev\b|/ro" r"ot/|/ho" r"me/(?!me\b|user\b|somebody\b)\w+|/Us" r"ers/\w+"
    ),
    "the host of a package registry": re.compile(
        r"py" r"pi\.org|pythonho" r"sted\.org|deb" r"ian\.org|npm" r"js\.(?:org|com)|download\.py" r"torch\.org",
        re.IGNORECASE,
    ),
}
TEXT = (".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".json", ".jsonl", ".cfg", ".ini", ".sh", ".svg", "")


def tracked() -> list[Path]:
    """The files of the repository: what git tracks, or all of them in an archive without git."""
    if (ROOT / ".git").exists():
        listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
        paths = [ROOT / name for name in listing.decode().split("\0") if name]
    else:
        paths = [path for path in ROOT.rglob("*") if not {".venv", "outputs"} & set(path.relative_to(ROOT).parts)]
    return [path for path in paths if path.is_file() and path.suffix in TEXT]


@pytest.mark.parametrize("what", sorted(FORBIDDEN))
def test_no_file_holds(what: str) -> None:
    pattern = FORBIDDEN[what]
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match.group()}"
        for path in tracked()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if (match := pattern.search(line))
    ]
    assert found == []


def test_no_file_holds_a_secret() -> None:
    """Tests may hold made-up ones."""
    files = [path for path in tracked() if path.relative_to(ROOT).parts[0] != "tests"]
    assert len(files) > 50
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if len(line) < 10_000 and redact_text(line, ()) != line
    ]
    assert found == []


def test_links_of_the_documentation_lead_somewhere() -> None:
    pages = [path for path in tracked() if path.suffix == ".md"]
    assert pages
    broken = []
    for page in pages:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if re.match(r"[a-z]+:|#", target):
                continue
            if not (page.parent / target.partition("#")[0]).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = [path.name for path in tracked() if path.parent == ROOT / "docs" and path.name != "README.md"]
    assert pages
    assert [page for page in pages if f"]({page})" not in index] == []
