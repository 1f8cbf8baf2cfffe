"""``hydra/launcher=volcano``: every preset renders what Volcano takes, without a secret; jobs are followed."""

from __future__ import annotations

import copy
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mgm_exp.bootstrap import CONF
from mgm_exp.errors import ConfigError, MissingDependencyError
from mgm_exp.slots import Work
from mgm_exp.volcano import VolcanoConfig, faults_of, job_name, render_job, settings_of
from mgm_exp.volcano.kubectl import Kubectl
from mgm_exp.volcano_slots import VolcanoSlots

PRESETS = sorted(path.stem for path in (CONF / "hydra" / "launcher").glob("volcano*.yaml"))
GIVEN = (
    "hydra.launcher.image=registry.example/mgm-exp:1",
    "hydra.launcher.outputs_claim=results",
    "paths.root=/outputs",
)
SWEEP = Path("/outputs/sweeps/s")


def settings(**given: Any) -> VolcanoConfig:
    return settings_of({"image": "registry.example/mgm-exp@sha256:0123", "outputs_claim": "results", **given})


def job(found: VolcanoConfig, *overrides: str, devices: int = 1, run_dir: Path = SWEEP / "0") -> dict[str, Any]:
    return render_job(found, name="s-123456-0", sweep=SWEEP, run_dir=run_dir, overrides=overrides, devices=devices)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_renders_a_manifest_that_fits(preset: str, compose_tree: Callable[..., Any]) -> None:
    tree = compose_tree(f"hydra/launcher={preset}", *GIVEN)
    found = settings_of(tree.hydra.launcher)
    manifest = job(found, devices=found.nodes * (found.gpus_per_node or 1))
    assert faults_of(manifest) == []
    assert manifest["spec"]["minAvailable"] == sum(task["replicas"] for task in manifest["spec"]["tasks"])
    assert yaml.safe_load(yaml.safe_dump(manifest)) == manifest


def test_a_job_over_several_machines(compose_tree: Callable[..., Any]) -> None:
    manifest = job(settings(nodes=3, gpus_per_node=4, priority_class="high", data_claim="data"), "zero=3", devices=12)
    main, node = manifest["spec"]["tasks"]
    assert (main["replicas"], node["replicas"], manifest["spec"]["minAvailable"]) == (1, 2, 3)
    assert main["template"]["spec"]["containers"][0]["command"] == ["python", "-m", "mgm_exp", "zero=3"]
    assert node["template"]["spec"]["containers"][0]["command"][-2:] == ["--wait", "/outputs/sweeps/s/0/.agents"]
    assert set(manifest["spec"]["plugins"]) == {"env", "svc"}
    assert {policy.get("event") for policy in manifest["spec"]["policies"]} == {"PodEvicted", "PodFailed"}
    assert {"event": "TaskCompleted", "action": "CompleteJob"} in main["policies"]
    for task in (main, node):
        pod = task["template"]["spec"]
        limits = pod["containers"][0]["resources"]["limits"]
        assert (limits["nvidia.com/gpu"], limits["memory"]) == ("4", "64Gi")
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}} in pod["volumes"]


def test_secrets_come_by_name_and_never_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    text = yaml.safe_dump(job(settings(env_from=["wandb/WANDB_API_KEY"])))
    assert "0123456789abcdef" not in text and "secretKeyRef" in text
    with pytest.raises(ConfigError, match="looks like a secret"):
        settings(env={"HF_TOKEN": "hf_x"})
    with pytest.raises(ConfigError, match="password in a URL"):
        settings(env={"PROXY": "http://me:word@proxy"})
    with pytest.raises(ConfigError, match="not the value"):
        settings(env_from=["WANDB_API_KEY=0123"])
    with pytest.raises(ConfigError, match="holds a secret"):
        job(settings(), "sweep.storage=postgresql+psycopg://me:word@db/study")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"image": None}, "image is not given"),
        ({"queue": "Two words"}, "queue='Two words'"),
        ({"nodes": 0}, "nodes=0"),
        ({"user_id": 0}, "root"),
        ({"shm_gb": 64.0}, "below mem_gb"),
        ({"outputs_path": "outputs"}, "absolute"),
        ({"image_pull_policy": "Sometimes"}, "Sometimes"),
        ({"gpus": 3}, "gpus"),
    ],
)
def test_settings_that_cannot_be_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(**given)
    assert says in str(caught.value)


def test_what_the_pods_do_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"not on the volume.*paths\.root=/outputs"):
        job(settings(), run_dir=Path("outputs/sweeps/s/0"))
    with pytest.raises(ConfigError, match="do not divide"):
        job(settings(nodes=2), devices=3)
    with pytest.raises(ConfigError, match="more than the job has"):
        job(settings(gpus_per_node=1), devices=2)


def _broken(change: Callable[[dict[str, Any]], Any]) -> list[str]:
    manifest = copy.deepcopy(job(settings(nodes=2), devices=2))
    change(manifest)
    return faults_of(manifest)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.update(kind="Pod"), "job.kind"),
        (lambda m: m["metadata"].update(name="Capital"), "job.metadata.name"),
        (lambda m: m["spec"].pop("tasks"), "no tasks"),
        (lambda m: m["spec"].update(minAvailable=3), "more than the 2 pods"),
        (lambda m: m["spec"].update(minAvailible=1), "no field that is known"),
        (lambda m: m["spec"].update(maxRetry=True), "not of type integer"),
        (lambda m: m["spec"]["policies"][0].update(exitCode=1), "exactly one of event, exitCode"),
        (lambda m: m["spec"]["policies"][0].update(event="PodTired"), "PodTired"),
        (lambda m: m["spec"]["tasks"][1].update(name="main"), "same name"),
        (lambda m: m["spec"]["tasks"][0]["template"]["spec"]["volumes"].pop(0), "no volumes of it"),
        (lambda m: m["spec"]["tasks"][0]["template"]["spec"]["securityContext"].update(runAsUser=0), "below 1"),
        (lambda m: m["spec"]["tasks"][0]["template"]["spec"]["containers"][0]["env"].append({"name": "A"}), "value"),
        (lambda m: m["spec"]["tasks"][0]["template"]["spec"]["containers"][0]["resources"]["limits"].update(cpu="9x"),
         "9x"),
    ],
)  # fmt: skip
def test_a_manifest_of_another_form_is_named_with_its_place(change: Callable[..., Any], says: str) -> None:
    faults = _broken(change)
    assert any(says in fault for fault in faults), faults


def test_names_are_what_kubernetes_takes() -> None:
    name = job_name("adapter=lora_r8,lora_r16+data=blip2 " * 4, SWEEP, 999)
    assert len(name) <= 50 and faults_of({**job(settings()), "metadata": {"name": name, "namespace": "x"}}) == []
    assert job_name("s", SWEEP, 1) != job_name("s", Path("/outputs/other/s"), 1)


# -- kubectl ------------------------------------------------------------------------------------------------------

KUBECTL = """#!/bin/sh
# A cluster of one folder: jobs are files, their phases too.
cd "$FAKE_CLUSTER" || exit 9
case "$2" in
  apply) cat > applied.yaml; name=$(sed -n 's/^  name: //p' applied.yaml | head -1)
         cp applied.yaml "job-$name"; echo Running > "phase-$name" ;;
  get) printf '{"items": ['; first=1
       for file in phase-*; do
         [ -e "$file" ] || continue
         [ $first = 1 ] || printf ','; first=0
         printf '{"metadata": {"name": "%s"}, "status": {"state": {"phase": "%s", "reason": "r"}}}' \
           "${file#phase-}" "$(cat "$file")"
       done; printf ']}' ;;
  delete) rm -f "phase-$4" "job-$4" ;;
  *) echo "what is $2?" >&2; exit 1 ;;
esac
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kubectl that keeps its jobs in a folder."""
    program = tmp_path / "bin" / "kubectl"
    program.parent.mkdir()
    program.write_text(KUBECTL)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    folder = tmp_path / "cluster"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_CLUSTER", str(folder))
    return folder


def test_jobs_are_submitted_followed_and_ended(
    cluster: Path, tmp_path: Path, compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mgm_exp.volcano_slots.ASK_S", 0.0)
    config = compose("sweep.name=s", "sweep.slots=3")
    found = VolcanoSlots(settings(outputs_path=str(tmp_path)), config, Kubectl("default"))
    works = [Work(n, tmp_path / "sweeps" / "s" / str(n), (f"trial={n}", "hydra/launcher=volcano")) for n in range(3)]
    for work in works:
        found.start(work)
    names = {path.name.removeprefix("job-"): yaml.safe_load(path.read_text()) for path in cluster.glob("job-*")}
    assert (found.busy, len(names)) == (3, 3)
    command = names[min(names)]["spec"]["tasks"][0]["template"]["spec"]["containers"][0]["command"]
    assert "trial=0" in command and "hydra.mode=RUN" in command and not any("launcher" in word for word in command)
    assert found.ended(0) == []
    first, second, third = sorted(names)
    (cluster / f"phase-{first}").write_text("Completed")
    (cluster / f"phase-{second}").write_text("Terminated")
    ended = {work.number: ending for work, ending in found.ended(0)}
    assert (ended[0].exit_code, ended[1].exit_code) == (0, 1)
    assert ended[1].how == f"its Volcano job {second} is Terminated: r"
    (stopped,) = found.stop()
    assert (stopped[0].number, stopped[1].exit_code) == (2, 130)
    assert not (cluster / f"job-{third}").exists()
    found.start(works[1])  # the job of the call before is replaced
    assert (cluster / f"phase-{second}").read_text().strip() == "Running" and found.busy == 1
    (cluster / f"phase-{second}").unlink()
    ((_, gone),) = found.ended(0)
    assert "was deleted" in gone.how


def test_without_kubectl_it_is_said_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependencyError, match=r"kubectl.*launch --dry-run"):
        Kubectl("default")


# -- mgm-exp launch -----------------------------------------------------------------------------------------------


def test_a_dry_run_prints_every_cell_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mgm_exp.cli import main

    folder = [f"hydra.launcher.outputs_path={tmp_path}", f"paths.root={tmp_path}/results"]
    code = main(["launch", "--dry-run", "hydra/launcher=volcano", *GIVEN[:2], *folder, "adapter=lora_r8,lora_r16"])
    manifests = list(yaml.safe_load_all(capsys.readouterr().out))
    assert code == 0 and [faults_of(manifest) for manifest in manifests] == [[], []]
    commands = [item["spec"]["tasks"][0]["template"]["spec"]["containers"][0]["command"] for item in manifests]
    assert [("adapter=lora_r8" in words, "adapter=lora_r16" in words) for words in commands] == [(1, 0), (0, 1)]
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_for_slurm_is_one_script(
    tmp_path: Path, app: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mgm_exp.cli import main

    pytest.importorskip("submitit")
    arguments = ["adapter.rank=4,8", f"paths.root={app.root}"]
    code = main(["launch", "--dry-run", "hydra/launcher=slurm_1gpu", *arguments])
    script = capsys.readouterr().out
    assert code == 0 and script.startswith("#!/bin/bash") and "#SBATCH --array=0-1" in script
    assert not app.root.exists()
    assert app("-m", "adapter.rank=4,8") == 0
    assert f"{app.sweep_dir}/0" in script, "the same folders as those of the sweep itself"


def test_a_search_shows_its_first_trial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mgm_exp.cli import main

    code = main(
        ["launch", "--dry-run", "hydra/launcher=volcano", *GIVEN, "hydra/sweeper=mgm_optuna", "sweep.name=s",
         "adapter.rank=choice(4,8)", "seed=3"]
    )  # fmt: skip
    (manifest,) = yaml.safe_load_all(capsys.readouterr().out)
    assert code == 0 and "seed=3" in json.dumps(manifest) and "choice" not in json.dumps(manifest)


def test_only_launchers_of_clusters_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    from mgm_exp.cli import main

    assert main(["launch", "--dry-run", "hydra/launcher=local", "seed=0,1"]) == 2
    assert "hydra/launcher=slurm or hydra/launcher=volcano" in capsys.readouterr().err
