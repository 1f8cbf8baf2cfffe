"""``pip install .`` gives a package that works from any folder, configuration included."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]


def tracked() -> list[str]:
    """The repository's files, without the tests."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    names = [name for name in listing.split("\0") if name and not name.startswith("tests/")]
    return [name for name in names if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built package. setuptools comes with the ``dev`` extra, so nothing is downloaded."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    done = subprocess.run([*command, "-w", str(folder), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    [built] = folder.glob("mgm_exp-*.whl")
    return built


def test_everything_that_the_package_needs_is_in_it(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    homes = {
        "mgm_exp/": "mgm_exp/",
        "conf/": "mgm_exp/conf/",
        "sweeps/": "mgm_exp/sweeps/",
        "launcher/hydra_plugins/": "hydra_plugins/",
    }
    needed = [
        home + name.removeprefix(folder)
        for folder, home in homes.items()
        for name in tracked()
        if name.startswith(folder)
    ]
    assert len(needed) > 100
    missing = [name for name in needed if name not in inside]
    assert missing == [], "name the package, or the kind of file, in pyproject.toml"
    assert "hydra_plugins/__init__.py" not in inside
    assert not [name for name in inside if name.startswith("tests/")]


def test_it_runs_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site)}

    def python(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    assert python("-c", "import mgm_exp; print(mgm_exp.__file__)").strip() == str(site / "mgm_exp" / "__init__.py")
    assert "adapter" in python("-m", "mgm_exp", "--help")
    assert "rank: 16" in python("-m", "mgm_exp", "--cfg", "job", "adapter=lora_r16")
    assert "blip2" in python("-m", "mgm_exp", "+sweeps=ablation", "--cfg", "all")
    assert list(elsewhere.iterdir()) == []


def test_every_pinned_version_accepts_every_python_that_the_package_accepts() -> None:
    """Distributions ship the first releases of a Python for years: Debian 12 has 3.11.2."""
    accepted = SpecifierSet(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["requires-python"])
    pythons = [f"3.{minor}.0" for minor in range(8, 20) if f"3.{minor}.0" in accepted]
    assert pythons
    pins = [line.split("==") for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if "==" in line]
    refused = []
    for name, _, *_ in (pin for pin in pins if not pin[0].startswith("#")):
        try:
            wanted = metadata.metadata(name)["Requires-Python"]
        except metadata.PackageNotFoundError:
            continue  # a pin of an extra that is not installed here
        refused += [f"{name}: {wanted}" for python in pythons if wanted and python not in SpecifierSet(wanted)]
    assert refused == []
