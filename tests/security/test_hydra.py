"""Whatever a preset, an experiment or a sweep file says: nothing is called, imported, set or written that it names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mgm_exp.command import main
from mgm_exp.compose import compose_tree, session
from mgm_exp.errors import ConfigError
from tests.fault_table import met

SECRET = "0123456789abcdef0123456789abcdef01234567"

# What stands in a file that --config-dir brings, and what the refusal names. SENTINEL is a file that must not appear.
HOSTILE = {
    "a target in a section": ("train:\n  _target_: pathlib.Path.touch\n  _args_: [SENTINEL]\n", r"train\._target_"),
    "a target deep inside": ("data:\n  recipe:\n    x: [{_target_: os.system}]\n", r"data\.recipe"),
    "a callback": ("hydra:\n  callbacks:\n    x: {_target_: pathlib.Path.touch, _args_: [SENTINEL]}\n", "callbacks"),
    "another launcher": ("hydra:\n  launcher:\n    _target_: pathlib.Path.touch\n", r"hydra\.launcher\._target_"),
    "another sweeper": ("hydra:\n  sweeper:\n    _target_: subprocess.Popen\n", r"hydra\.sweeper\._target_"),
    "a log handler": (
        "hydra:\n  job_logging:\n    handlers:\n      x: {class: logging.handlers.SMTPHandler}\n", "allowed is logging",
    ),
    "a factory in the log": (
        "hydra:\n  job_logging:\n    formatters:\n      simple: {(): pathlib.Path.touch}\n", r"colorlog",
    ),
    "a stream that is imported": (
        "hydra:\n  job_logging:\n    handlers:\n      console: {stream: 'ext://os.environ'}\n", r"ext://sys\.stderr",
    ),
    "a log file elsewhere": (
        "hydra:\n  job_logging:\n    handlers:\n      x: {class: logging.FileHandler, filename: SENTINEL}\n",
        "log file lies in the run's folder",
    ),
    "variables": ("hydra:\n  job:\n    env_set: {LD_PRELOAD: SENTINEL}\n", "environment variables"),
    "a job's name that leads out": ("hydra:\n  job:\n    name: ../../SENTINEL\n", r"hydra\.job\.name"),
    "a trial's folder that leads out": ("hydra:\n  sweep:\n    subdir: ../../x\n", r"hydra\.sweep\.subdir"),
    "a secret's variable": ("name: run-${oc.env:WANDB_API_KEY}\n", "WANDB_API_KEY.*hold a secret"),
    "a variable that is computed": ("name: run-${oc.env:${oc.env:WHICH}}\n", "hold a secret"),
    "a secret": (f"tracker:\n  base_url: https://me:{SECRET}@wandb.example.org\n", "tracker.base_url seems to hold"),
    "a webhook": ("tracker:\n  base_url: https://hooks.slack.com/services/T0/B0/abcdefghijkl\n", "tracker.base_url"),
    "another resolver": ("name: ${eval:1}\n", "resolver 'eval'"),
    "an object": ("name: !!python/object/apply:os.system [touch SENTINEL]\n", "constructor"),
}  # fmt: skip


@pytest.fixture
def sentinel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "sentinel"


@pytest.fixture(scope="module")
def presets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """Hydra with a folder of hostile presets, and the file that they would make."""
    folder = tmp_path_factory.mktemp("presets")
    (folder / "experiment").mkdir()
    sentinel = folder / "sentinel"
    for number, what in enumerate(sorted(HOSTILE)):
        text = HOSTILE[what][0].replace("SENTINEL", str(sentinel))
        (folder / "experiment" / f"{number}.yaml").write_text(f"# @package _global_\n{text}")
    with session(str(folder)) as hydra:
        yield hydra, sentinel


@pytest.mark.parametrize("what", sorted(HOSTILE))
def test_a_preset_cannot(what: str, presets: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    hydra, sentinel = presets
    with pytest.raises(Exception, match=HOSTILE[what][1]) as caught:
        compose_tree(hydra, [f"experiment='{sorted(HOSTILE).index(what)}'"])
    assert what == "an object" or isinstance(caught.value, ConfigError)
    assert SECRET not in str(caught.value) and not sentinel.exists()
    met("hostile settings", 1)


@pytest.mark.parametrize(
    "override",
    [
        "hydra.searchpath=[pkg://antigravity]",
        "+hydra.job.env_set.PATH=x",
        "hydra.job.env_copy=[WANDB_API_KEY]",
        "+hydra/callbacks@hydra.callbacks.x=log_job_return",
        "name=${oc.env:HF_TOKEN}",
        "hydra.sweep.subdir=/tmp",
        "hydra.job.name=a/b",
        "+train.x={class: os.system}",
        "train.lr=1e400",
        "train.lr=nan",
        "adapter.alpha=nan",
        "plan.price=inf",
    ],
)
def test_an_override_cannot_either(override: str, compose: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError):
        compose(override)
    met("hostile settings", 1)


def test_showing_a_configuration_searches_nowhere_else(sentinel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--cfg`` is Hydra's own program, which would import the package of a ``pkg://`` address."""
    (sentinel.parent / "evil.py").write_text(f"open({str(sentinel)!r}, 'w')")
    assert main(["--cfg", "job", "hydra.searchpath=[pkg://evil]"]) == 2
    assert "places to search" in capsys.readouterr().err and not sentinel.exists()


def test_the_cells_of_a_sweep_are_looked_at_too(
    sentinel: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    presets = tmp_path / "presets" / "experiment"
    presets.mkdir(parents=True)
    (presets / "good.yaml").write_text("# @package _global_\nseed: 1\n")
    (presets / "bad.yaml").write_text(
        f"# @package _global_\nhydra:\n  callbacks:\n    x: {{_target_: pathlib.Path.touch, _args_: [{sentinel}]}}\n"
    )
    arguments = ["-m", "--config-dir", str(presets.parent), "experiment=bad,bad", f"paths.root={tmp_path}/out"]
    assert main(arguments) == 2
    assert "hydra.callbacks" in capsys.readouterr().err and not sentinel.exists()
    assert not os.path.exists(tmp_path / "out" / "sweeps")


@pytest.mark.parametrize("override", ["hydra/launcher=slurm", "hydra/job_logging=default"])
def test_what_the_package_and_hydra_ship_is_allowed(override: str, compose: Callable[..., Any]) -> None:
    assert compose(override)
