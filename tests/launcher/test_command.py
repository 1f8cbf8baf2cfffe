"""One run from its command line: folder, exit code, messages; and the names for notebooks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from mgm_exp.bootstrap import ROOT
from mgm_exp.errors import Interrupted
from mgm_exp.signals import stop_on_signals


def runs(app: Any) -> list[Path]:
    return sorted((app.root / "runs").glob("*/*/"))


def test_a_run_writes_its_folder_below_name_and_time(app: Any) -> None:
    assert app("adapter=lora_r16", "seed=3") == 0
    (folder,) = runs(app)
    assert folder.parent.name == "tiny-raw-lora_r16"
    for name in (".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml", "result.json"):
        assert (folder / name).is_file(), name
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["command"][:5] == ["python", "-m", "mgm_exp", "adapter=lora_r16", "seed=3"]
    assert (folder / "calls.txt").read_text(encoding="utf-8").startswith("None None adapter=lora_r16 seed=3")
    assert sorted(path.name for path in app.root.iterdir()) == ["runs"]


def test_a_failed_run_ends_with_1_and_is_continued(app: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert app("adapter.rank=4", fail="4") == 1
    error = capsys.readouterr().err
    assert "told to fail" in error and "Traceback" not in error
    assert app("adapter.rank=4") == 0
    (folder,) = runs(app)
    assert len((folder / "calls.txt").read_text(encoding="utf-8").splitlines()) == 2
    assert app("adapter.rank=4") == 0
    assert len(runs(app)) == 2, "a finished one is left alone"


def test_an_interrupted_run_ends_with_130_and_is_continued(app: Any) -> None:
    process = app.start("adapter.rank=4", stop="4")
    folder = app.waits_in("runs/*/*", process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert json.loads((folder / "result.json").read_text(encoding="utf-8"))["status"] == "interrupted"
    (folder / "go").touch()
    assert app("adapter.rank=4") == 0
    assert runs(app) == [folder]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_a_signal_in_the_first_moment_ends_the_command_with_130(number: signal.Signals, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "mgm_exp", f"paths.root={tmp_path}"]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    caught = 0
    while not caught >> signal.SIGUSR1 - 1 & 1:  # the first instant in which Python listens to it
        assert process.poll() is None
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    process.send_signal(number)
    assert process.communicate(timeout=60)[1] == f"Stopped by {number.name}.\n"
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


def test_a_signal_while_a_configuration_is_merged_is_told_as_it_is() -> None:
    OmegaConf.register_new_resolver("signalled", lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted) as caught, stop_on_signals():
        _ = OmegaConf.create({"a": "${signalled:}"}).a
    OmegaConf.clear_resolver("signalled")
    assert str(caught.value).startswith("Stopped by SIGTERM; what") and "full_key" not in str(caught.value)


def test_a_killed_run_is_continued_and_a_running_one_is_not_touched(app: Any) -> None:
    first = app.start("adapter.rank=4", stop="4")
    folder = app.waits_in("runs/*/*", first)
    assert app("adapter.rank=4") == 0
    other = next(path for path in runs(app) if path != folder)
    assert not (folder / "result.json").exists()
    os.kill(first.pid, signal.SIGKILL)
    first.wait(timeout=60)
    # The newest run of this configuration decides; it is finished, so the killed one is history.
    (other / "result.json").unlink()
    assert app("adapter.rank=4") == 0
    assert sorted(runs(app)) == sorted([folder, other])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train.lrr=1"], "Did you mean train.lr?"),
        (["adapter=lora_r8,lora_r16"], "Add -m"),
        (["hydra.mode=MULTIRUN", "train.lr=-1"], "train.lr=-1.0"),
        (["name=../../x"], "not a folder name"),
        (["hydra.run.dir=/tmp/elsewhere"], "outside of paths.root"),
        (["hydra.run.dir=${paths.root}/../x"], "outside of paths.root"),
        (["hydra.output_subdir=../../x"], "plain folder name"),
        (["hydra.job.chdir=true"], "chdir"),
        (["+hydra.callbacks.x._target_=pathlib.Path.touch", "+hydra.callbacks.x._args_=[boo]"], "cannot name"),
        (["--experimental-rerun", "job.pickle"], "pickle"),
        (["--config-path", "/etc"], "--config-dir"),
        (["--config-dir", "/nowhere"], "is not a folder"),
    ],
)
def test_what_cannot_be_run_is_refused_with_2_before_anything_is_written(
    app: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert app(*arguments) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert "Traceback" not in captured.err
    assert not list(app.root.glob("*/*"))


def test_debug_shows_the_traceback_and_reaches_no_one_else(app: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert app("--debug", "train.lrr=1") == 2
    captured = capsys.readouterr()
    assert "Traceback" in captured.err and "Did you mean train.lr?" in captured.err


def test_hydra_full_error_shows_the_traceback_too(
    app: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert app("train.lrr=1") == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_error_nobody_foresaw_shows_its_traceback_and_ends_with_1(
    app: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any, **kwargs: Any) -> dict[str, Any]:
        raise RuntimeError("a bug")

    app.task = broken
    assert app() == 1
    captured = capsys.readouterr()
    assert "Traceback" in captured.err and "RuntimeError: a bug" in captured.err


def test_a_folder_inside_of_the_root_may_be_chosen(app: Any) -> None:
    assert app(f"hydra.run.dir={app.root}/runs/mine/here") == 0
    assert (app.root / "runs/mine/here/result.json").is_file()


def test_a_path_with_spaces_quotes_and_commas_is_a_path(app: Any) -> None:
    app.root = app.root / 'it\'s a, "path"'
    app.root.mkdir(parents=True)
    from mgm_exp.command import main, quoted

    assert main([f"paths.root={quoted(str(app.root))}"], task=app.task) == 0
    assert len(runs(app)) == 1
    assert main(["-m", "adapter.rank=4,8", f"paths.root={quoted(str(app.root))}"], task=app.task) == 0
    assert len(app.sweep()["trials"]) == 2


SHOWN = [
    (["--help"], ["python -m mgm_exp -m", "lora_r16", "+sweeps", "ablation", "Exit codes"]),
    (["--cfg", "job"], ["rank: 8", "train.default_lr"]),
    (["--cfg", "job", "--resolve", "zero=2"], ["stage: 2", "name: tiny-raw-lora_r8-zero2", "lr: 0.005"]),
    (["--cfg", "job", "--package", "adapter", "adapter=lora_r16"], ["rank: 16"]),
    (["--cfg", "hydra"], ["mgm_exp_plugins"]),
    (["--info", "defaults-tree", "model=mgm_2b"], ["train: official"]),
    (["--info", "searchpath"], ["mgm-sweeps://"]),
    (["--hydra-help"], ["Hydra"]),
]


@pytest.mark.parametrize(("arguments", "says"), SHOWN, ids=[" ".join(case[0]) for case in SHOWN])
def test_a_command_can_be_looked_at_without_running_it(
    app: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], says: list[str]
) -> None:
    overrides = [] if "help" in arguments[0] else [f"paths.root={app.root}"]
    from mgm_exp.command import main

    assert main([*arguments, *overrides], task=app.task) == 0
    output = capsys.readouterr().out
    for part in says:
        assert part in output
    assert not app.root.exists()


def test_showing_a_configuration_with_a_mistake_explains_it(app: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert app("--cfg", "job", "adapter=lora_r17") == 2
    captured = capsys.readouterr()
    assert "Did you mean adapter=lora_r16?" in captured.err and "Traceback" not in captured.err


def test_the_names_for_notebooks(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import mgm_exp
    from mgm_exp import command
    from mgm_exp.errors import ConfigError, TrainingFailed

    monkeypatch.setattr(command, "_run_experiment", app.task)
    root, here = f"paths.root={app.root}", "hydra/launcher=basic"  # workers would run the experiment itself
    result = mgm_exp.run(["adapter=lora_r16", root])
    assert (result["status"], result["metrics"]["demo/accuracy"]) == ("completed", 0.8)
    sweep = mgm_exp.sweep(["zero=2", here, root])
    assert [trial["status"] for trial in sweep["trials"]] == ["completed"]
    monkeypatch.setenv("SMALL_FAIL", "5")
    with pytest.raises(TrainingFailed):
        mgm_exp.run(["adapter.rank=5", root])
    failed = mgm_exp.sweep(["adapter.rank=5,6", here, root])
    assert [trial["status"] for trial in failed["trials"]] == ["failed", "completed"]
    with pytest.raises(ConfigError, match="more than one value"):
        mgm_exp.run(["adapter=lora_r8,lora_r16", root])
    with pytest.raises(ConfigError, match="sweep"):
        mgm_exp.run(["+sweeps=ablation", root])
    with pytest.raises(AttributeError):
        mgm_exp.nothing  # noqa: B018


def test_compare_is_a_function_and_a_package() -> None:
    import mgm_exp
    import mgm_exp.compare.statistics as statistics

    assert callable(mgm_exp.compare)
    assert statistics.wilson_interval(1, 2)
