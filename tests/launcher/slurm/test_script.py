"""The batch script: every setting where sbatch reads it, nothing else, no secret; wrong settings are named."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from mgm_exp.bootstrap import CONF
from mgm_exp.errors import ConfigError
from mgm_exp.slurm import SlurmConfig, render_script, settings_of

FOLDER = Path("/shared/outputs/sweeps/s/.slurm/0123456789")
RUNS = [(Path(f"/shared/outputs/sweeps/s/{number}"), (f"adapter.rank={number}", "name='a b'")) for number in range(2)]
PROGRAM = ("python", "-m", "mgm_exp")


def rendered(settings: SlurmConfig | None = None, **changes: Any) -> str:
    given: dict[str, Any] = {"name": "s-0123", "folder": FOLDER, "program": PROGRAM, "runs": RUNS[:1], **changes}
    return render_script(settings or SlurmConfig(), **given)


def options(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    return {line.partition("=")[0]: line.partition("=")[2] for line in lines}


@pytest.mark.parametrize("preset", sorted(path.stem for path in (CONF / "hydra" / "launcher").glob("slurm*.yaml")))
def test_every_preset_makes_a_script_that_bash_reads(preset: str, compose_tree: Any) -> None:
    tree = compose_tree(f"hydra/launcher={preset}", is_sweep=True)
    script = rendered(settings_of(tree.hydra.launcher))
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    nodes = {"slurm_2node": "2"}.get(preset, "1")
    gpus = {"slurm_1gpu": "1", "slurm_8gpu": "8", "slurm_2node": "8"}.get(preset)
    found = options(script)
    assert (found["nodes"], found.get("gpus-per-node"), found["ntasks-per-node"]) == (nodes, gpus, "1")


def test_a_plain_job_asks_for_nothing_that_was_not_given() -> None:
    found = options(rendered())
    assert found == {
        "comment": f"'mgm_exp {FOLDER}'", "export": "ALL", "job-name": "s-0123", "nodes": "1", "ntasks-per-node": "1",
        "open-mode": "append", "output": f"{FOLDER}/%j.out", "requeue": "", "signal": "B:USR2@120", "time": "60",
    }  # fmt: skip


def test_what_is_given_stands_in_the_options() -> None:
    settings = settings_of(
        {
            "partition": "gpu", "account": "me", "qos": "low", "constraint": "a100|h100", "mem_gb": 1.5, "nodes": 2,
            "gpus_per_node": 4, "cpus_per_task": 16, "timeout_min": 1, "array_parallelism": 3,
            "additional_parameters": {"mail_type": "END", "exclusive": True}, "setup": ["module load cuda"],
        }
    )  # fmt: skip
    script = rendered(settings, runs=RUNS * 4, is_array=True, code=Path("/shared/code"))
    found = options(script)
    assert (found["array"], found["output"]) == ("0-7%3", f"{FOLDER}/%A_%a.out")
    assert found["signal"] == "B:USR2@15", "a short stretch is not spent on saving"
    assert (found["constraint"], found["mem"], found["mail-type"], found["exclusive"]) == (
        "'a100|h100'", "1536M", "END", "",
    )  # fmt: skip
    assert script.index("module load cuda") < script.index("PYTHONPATH=/shared/code:/shared/code/launcher")
    assert script.splitlines()[-1] == (
        f"exec {Path(__import__('sys').executable)} /shared/code/mgm_exp/slurm/job.py {FOLDER} -- python -m mgm_exp"
    )


def test_several_runs_need_an_array() -> None:
    with pytest.raises(ValueError, match="array"):
        rendered(runs=RUNS)


def test_what_a_run_is_given_cannot_become_a_command() -> None:
    script = rendered(runs=[(Path("/x"), ("name=a\nrm -rf /", "b=$(reboot)`reboot`"))])
    assert not [line for line in script.splitlines() if "rm -rf" in line and not line.startswith("# task 0:")]


def test_containers() -> None:
    given = {"runtime": "apptainer", "image": "/img/a.sif", "mounts": ["/data", "/x:/y"], "options": ["--cleanenv"]}
    last = rendered(settings_of({"container": given, "gpus_per_node": 1})).splitlines()[-1]
    assert last.startswith("exec python3 ")
    assert last.endswith(
        "-- apptainer exec --nv --bind /shared/outputs/sweeps/s:/shared/outputs/sweeps/s --bind /data:/data "
        "--bind /x:/y --cleanenv /img/a.sif python -m mgm_exp"
    )
    last = rendered(settings_of({"container": {"runtime": "enroot", "image": "a.sqsh"}})).splitlines()[-1]
    assert " -- enroot start --mount /shared/" in last and "--env WANDB_API_KEY --env" in last
    assert last.endswith("a.sqsh python -m mgm_exp")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"partion": "gpu"}, "partion"),
        ({"nodes": 0}, "hydra.launcher.nodes=0 must be"),
        ({"timeout_min": 1, "signal_delay_s": 60}, "signal_delay_s=60 must lie between 0 and the 60 s"),
        ({"setup": ["a\nb"]}, "line break"),
        ({"partition": "a\n#SBATCH --uid=0"}, "line break"),
        ({"additional_parameters": {"time": 5}}, "hydra.launcher.timeout_min"),
        ({"additional_parameters": {"--export": "NONE"}}, "hydra.launcher.secrets"),
        ({"additional_parameters": {"x": [1]}}, "a text, a number or true"),
        ({"container": {"runtime": "enroot"}}, "needs hydra.launcher.container.image"),
        ({"container": {"image": "a"}}, "no runtime"),
        ({"max_requeues": -1}, "max_requeues=-1"),
    ],
)
def test_wrong_settings_are_refused_with_their_reason(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings_of(given)
    assert says in str(caught.value)


def test_a_secret_in_a_setup_line_is_refused_and_not_repeated() -> None:
    key = "0123456789abcdef0123456789abcdef01234567"
    with pytest.raises(ConfigError) as caught:
        rendered(settings_of({"setup": [f"export WANDB_API_KEY={key}"]}))
    assert key not in str(caught.value) and "hydra.launcher.secrets" in str(caught.value)


def test_a_misspelt_key_of_the_launcher_is_explained(app: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert app("-m", "hydra/launcher=slurm", "hydra.launcher.partion=gpu", "adapter.rank=1,2") == 2
    assert "Did you mean partition?" in capsys.readouterr().err


def test_a_launcher_is_refused_where_it_would_do_nothing(app: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert app("hydra/launcher=slurm", "adapter.rank=1") == 2
    assert "Give -m with it" in capsys.readouterr().err
    assert app("-m", "adapter.rank=1,2", "launch.wait=false") == 2
    assert "launch.wait=false needs somebody else" in capsys.readouterr().err


def test_a_machine_without_slurm_says_so(
    app: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert app("-m", "hydra/launcher=slurm", "adapter.rank=1,2") == 2
    assert "sbatch, squeue, scancel, srun, scontrol cannot be found" in capsys.readouterr().err


def test_more_devices_than_the_job_has_are_refused(app: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("-m", "hydra/launcher=slurm_1gpu", "adapter.rank=1,2", "devices=2")
    assert app(*arguments) == 2
    assert "devices=2 is more than the job has" in capsys.readouterr().err
