"""The package finds its configuration and its plugins wherever it lies, and numbers may name choices."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mgm_exp import bootstrap
from mgm_exp.bootstrap import quote_numeric_choices
from mgm_exp.config import ExperimentConfig

REPOSITORY = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "peft", "deepspeed", "wandb", "optuna", "submitit", "numpy", "PIL")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("zero=2", "zero='2'"),
        ("zero=2,3", "zero='2','3'"),
        ("zero=2, 3", "zero='2','3'"),
        ("+zero=2", "+zero='2'"),
        ("zero@zero=2", "zero@zero='2'"),
        ("zero=choice(2,3)", "zero=choice(\"'2'\",\"'3'\")"),
        ("zero=choice('2', '3')", "zero=choice(\"'2'\",\"'3'\")"),
        ("zero=choice(none,3)", "zero=choice(none,\"'3'\")"),
        ("zero=none", "zero=none"),
        ("zero='2'", "zero='2'"),
        ("adapter=7", "adapter='7'"),
        ("seed=2", "seed=2"),
        ("seed=2,3", "seed=2,3"),
        ("adapter.rank=8", "adapter.rank=8"),
        ("train.lr=1e-3", "train.lr=1e-3"),
        ("data.path=/some/2", "data.path=/some/2"),
        ("zero", "zero"),
        ("--cfg", "--cfg"),
        ("~zero", "~zero"),
    ],
)
def test_numbers_that_name_choices_are_quoted_and_nothing_else(given: str, wanted: str) -> None:
    assert quote_numeric_choices([given]) == [wanted]
    assert quote_numeric_choices([wanted]) == [wanted], "quoting twice changes nothing"


@pytest.mark.parametrize("override", ["zero=2", "zero='2'"])
def test_a_choice_named_by_a_number_composes(compose: Callable[..., ExperimentConfig], override: str) -> None:
    assert compose(override).zero.stage == 2


def test_a_mix_of_names_and_numbers_is_swept() -> None:
    from mgm_exp.grid import parse_grid

    for text in ("zero=none,2,3", "zero=choice(none,2,3)", "zero=none,'2','3'"):
        cells = list(parse_grid([text], {}).cells())
        assert [cell.params["zero"] for cell in cells] == ["none", "2", "3"], text
        assert [cell.overrides[0] for cell in cells] == ["zero=none", "zero='2'", "zero='3'"], text


def python(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "HYDRA_FULL_ERROR")}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=kept | environment, check=False
    )


def test_composing_and_help_load_nothing_heavy(tmp_path: Path) -> None:
    code = f"""
import sys
import mgm_exp, mgm_exp.cli, mgm_exp.config, mgm_exp.store
from mgm_exp.command import main
for arguments in (["--help"], ["--cfg", "job", "--resolve", "zero=2", "+sweeps=ablation"], ["train.lrr=1"]):
    main(arguments)
mgm_exp.cli.main(["--help"])
from mgm_exp.compose import compose
compose(["model=mgm_2b", "zero=3"])
print("LOADED", sorted({{name.split(".")[0] for name in sys.modules}} & set({HEAVY!r})))
"""
    done = python(code, tmp_path, PYTHONPATH=str(REPOSITORY))
    assert "LOADED []" in done.stdout, done.stdout[-500:] + done.stderr
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_status_and_report_of_a_sweep_load_no_torch(tmp_path: Path) -> None:
    from tests.compare.run_folders import write_demo_sweep

    sweep = write_demo_sweep(tmp_path / "outputs" / "sweeps" / "demo")
    code = f"""
import sys
from mgm_exp.cli import main
codes = [main(["status", "--root", {str(tmp_path / "outputs")!r}]), main(["status", {str(sweep)!r}])]
codes.append(main(["report", {str(sweep)!r}, "--out", {str(tmp_path / "report.html")!r}]))
print("CODES", codes)
print("LOADED", sorted({{name.split(".")[0] for name in sys.modules}} & set({HEAVY!r}) - {{"numpy", "PIL"}}))
"""
    done = python(code, tmp_path, PYTHONPATH=str(REPOSITORY))
    assert "CODES [0, 0, 0]" in done.stdout and "LOADED []" in done.stdout, done.stdout[-500:] + done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files as a wheel of this repository lays them out, by the mapping in pyproject.toml."""
    tomllib = pytest.importorskip("tomllib", reason="part of Python from 3.11 on")
    site = tmp_path_factory.mktemp("site")
    tool = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    for package, folder in tool["package-dir"].items():
        ignore = shutil.ignore_patterns("__pycache__", "*.safetensors")
        shutil.copytree(REPOSITORY / folder, site.joinpath(*package.split(".")), ignore=ignore, dirs_exist_ok=True)
    return site


def test_an_installed_package_brings_configuration_sweeps_and_plugins(installed: Path, tmp_path: Path) -> None:
    code = """
from mgm_exp import bootstrap
from mgm_exp.compose import compose, compose_tree, session
assert bootstrap.ROOT.name == "mgm_exp", bootstrap.ROOT
assert compose(["zero=2", "model=mgm_2b"]).train.name == "official"
with session() as hydra:
    tree = compose_tree(hydra, ["+sweeps=ablation"], is_sweep=True)
    assert tree.hydra.mode.name == "MULTIRUN" and "mgm_exp_plugins" in tree.hydra.sweeper._target_
    from hydra.core.plugins import Plugins
    Plugins.instance().instantiate_sweeper
    assert any(plugin.__name__ == "MgmGridSweeper" for plugin in Plugins.instance().discover())
print("FINE")
"""
    done = python(code, tmp_path, PYTHONPATH=str(installed))
    assert done.stdout.strip().endswith("FINE"), done.stderr


def test_an_editable_install_that_hides_the_plugin_folder_from_the_scan_is_repaired(tmp_path: Path) -> None:
    """setuptools' import hook gives ``hydra_plugins.__path__`` an entry that is no folder; see the first lines."""
    code = f"""
import importlib.machinery, sys
sys.path.insert(0, {str(REPOSITORY)!r})
class Hook:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "hydra_plugins":
            spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = ["__editable__.mgm_exp-0.1.0.finder.__path_hook__"]
            return spec
sys.meta_path.append(Hook)
from mgm_exp.compose import compose_tree, session
with session() as hydra:
    compose_tree(hydra, ["+sweeps=ablation"], is_sweep=True)
print("FINE")
"""
    done = python(code, tmp_path)
    assert done.stdout.strip().endswith("FINE"), done.stderr


def test_child_processes_find_package_and_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    bootstrap.plugins()
    bootstrap.plugins()
    paths = os.environ["PYTHONPATH"].split(os.pathsep)
    assert paths == ["/somewhere", str(bootstrap.ROOT), str(bootstrap.LAUNCHER)]


def test_another_use_of_hydra_in_the_process_finds_its_own_again(tmp_path: Path) -> None:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from mgm_exp.compose import compose

    (tmp_path / "theirs.yaml").write_text("key: value\n", encoding="utf-8")
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(tmp_path), version_base="1.3"):
            assert compose(["seed=3"]).seed == 3
            assert hydra_compose("theirs").key == "value"
    finally:
        GlobalHydra.instance().hydra = before


def test_presets_of_ones_own_are_added_by_a_folder(tmp_path: Path) -> None:
    from mgm_exp.compose import checked, compose_tree, session
    from mgm_exp.errors import ConfigError

    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mine.yaml").write_text("defaults: [demo, _self_]\nname: mine\nlr: 0.25\n", encoding="utf-8")
    with session(str(tmp_path)) as hydra:
        config = checked(compose_tree(hydra, ["train=mine"]))
        assert (config.train.name, config.train.lr, config.train.max_steps) == (
            "mine",
            0.25,
            checked(compose_tree(hydra, [])).train.max_steps,
        )
        with pytest.raises(ConfigError, match="demo, hf, mine, official"):
            compose_tree(hydra, ["train=nope"])
    with pytest.raises(ConfigError, match="is not a folder"), session(str(tmp_path / "nowhere")):
        pass
