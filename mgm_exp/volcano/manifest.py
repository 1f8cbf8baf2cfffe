"""The manifest of one run: a ``batch.volcano.sh/v1alpha1`` Job with a pod on each machine, as plain data.

The task ``main`` has one pod, which runs the experiment. Where a run has several machines, the pods of the task
``node`` wait on a board in the run folder for work (:mod:`mgm_exp.train.board`); the plugins ``env`` and ``svc`` tell
every pod its number and the names of the others.

    scheduling     minAvailable = all pods: together or not at all; queue, priority
    eviction       the whole job starts again, and continues from its checkpoints
    failure        what the run says of itself is final (exit codes 1, 2, 3); what was killed or lost starts again
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from mgm_exp.errors import ConfigError
from mgm_exp.volcano.schema import faults_of
from mgm_exp.volcano.settings import VolcanoConfig

# Every job of a sweep has this label, with a value of its sweep's own.
LABEL = "mgm-exp/sweep"
MAIN, NODE = "main", "node"
# In the image; see launcher/volcano/Dockerfile.
PROGRAM = ("python", "-m", "mgm_exp")
AGENT = ("python", "-m", "mgm_exp.train.agent", "--wait")
# Host names are the job's name, the task's and a number, and have 63 characters at most.
LONGEST_NAME = 50
_FINAL_EXIT_CODES = (1, 2, 3)
_HELD_SECRET = re.compile(r"://[^/@\s:]*:[^/@\s]+@")


def job_name(sweep: str, folder: Path, number: int) -> str:
    """A name that Kubernetes takes, the same for the same trial of the same sweep folder."""
    word = re.sub(r"[^a-z0-9]+", "-", sweep.lower()).strip("-")[:30].strip("-") or "sweep"
    return f"{word}-{sweep_label(folder)[:6]}-{number}"


def sweep_label(folder: Path) -> str:
    """The value of :data:`LABEL`: tells sweeps apart whatever they are called."""
    return hashlib.sha256(str(folder).encode()).hexdigest()[:16]


def render_job(
    settings: VolcanoConfig, *, name: str, sweep: Path, run_dir: Path, overrides: Sequence[str], devices: int
) -> dict[str, Any]:
    """The manifest, checked against the schema.

    Args:
        settings: ``hydra.launcher``.
        name: Of the job.
        sweep: The sweep's folder.
        run_dir: The run's folder, as the pods see it.
        overrides: What the run is given.
        devices: Processes of the run, over all pods.

    Raises:
        ConfigError: The run folder is not on the volume, the pods have too few GPUs, or the manifest would hold a
            secret or what Volcano does not take.
    """
    _check(settings, run_dir, overrides, devices)
    board = str(run_dir / ".agents")
    tasks = [_task(MAIN, 1, settings, [*PROGRAM, *overrides], board)]
    tasks[0]["policies"] = [
        {"event": "TaskCompleted", "action": "CompleteJob"},
        *({"exitCode": code, "action": "TerminateJob"} for code in _FINAL_EXIT_CODES),
    ]
    if settings.nodes > 1:
        tasks.append(_task(NODE, settings.nodes - 1, settings, [*AGENT, board], board))
    spec: dict[str, Any] = {
        "schedulerName": "volcano",
        "minAvailable": settings.nodes,
        "queue": settings.queue,
        "maxRetry": settings.max_retry,
        "plugins": {"env": [], "svc": ["--publish-not-ready-addresses=true"]},
        "policies": [
            {"event": "PodEvicted", "action": "RestartJob"},
            {"event": "PodFailed", "action": "RestartJob"},
        ],
        "tasks": tasks,
    }
    if settings.priority_class:
        spec["priorityClassName"] = settings.priority_class
    if settings.ttl_s is not None:
        spec["ttlSecondsAfterFinished"] = settings.ttl_s
    manifest = {
        "apiVersion": "batch.volcano.sh/v1alpha1",
        "kind": "Job",
        "metadata": {"name": name, "namespace": settings.namespace, "labels": {LABEL: sweep_label(sweep)}},
        "spec": spec,
    }
    faults = faults_of(manifest)
    if faults:
        raise ConfigError(f"Volcano would not take the job {name}: {'; '.join(faults)}.")
    return manifest


def _check(settings: VolcanoConfig, run_dir: Path, overrides: Sequence[str], devices: int) -> None:
    if not PurePosixPath(run_dir).is_relative_to(settings.outputs_path):
        raise ConfigError(
            f"The run folder {run_dir} is not on the volume {settings.outputs_claim}, which the pods see at "
            f"{settings.outputs_path}.",
            advice=f"Give paths.root={settings.outputs_path}/... , and mount the volume there on this machine, too.",
        )
    if devices % settings.nodes:
        raise ConfigError(f"devices={devices} processes do not divide over hydra.launcher.nodes={settings.nodes} pods.")
    if settings.gpus_per_node is not None and devices > settings.nodes * settings.gpus_per_node:
        raise ConfigError(
            f"devices={devices} is more than the job has: hydra.launcher.nodes={settings.nodes} x "
            f"gpus_per_node={settings.gpus_per_node}.",
            advice="Ask for more nodes or GPUs, or set devices to what there is.",
        )
    from mgm_exp.record import redact_text  # here: the schema of this launcher is loaded with every command

    for item in overrides:
        if redact_text(item) != item or _HELD_SECRET.search(item):
            raise ConfigError(
                f"{item.partition('=')[0]} holds a secret, and manifests are kept by the cluster for all to read.",
                advice="Put it into a Secret and name that in hydra.launcher.env_from.",
            )


def _task(name: str, replicas: int, settings: VolcanoConfig, command: Sequence[str], board: str) -> dict[str, Any]:
    return {
        "name": name,
        "replicas": replicas,
        "minAvailable": replicas,
        "template": {"metadata": {"labels": {"app": "mgm-exp"}}, "spec": _pod(name, settings, command, board)},
    }


def _pod(name: str, settings: VolcanoConfig, command: Sequence[str], board: str) -> dict[str, Any]:
    mounts: list[dict[str, Any]] = [
        {"name": "outputs", "mountPath": settings.outputs_path},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    volumes: list[dict[str, Any]] = [
        {"name": "outputs", "persistentVolumeClaim": {"claimName": settings.outputs_claim}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": _gib(settings.shm_gb)}},
    ]
    if settings.data_claim:
        mounts.append({"name": "data", "mountPath": settings.data_path, "readOnly": True})
        claim = {"claimName": settings.data_claim, "readOnly": True}
        volumes.append({"name": "data", "persistentVolumeClaim": claim})
    amounts = {"cpu": str(settings.cpus_per_node), "memory": _gib(settings.mem_gb)}
    if settings.gpus_per_node is not None:
        amounts[settings.gpu_resource] = str(settings.gpus_per_node)
    container = {
        "name": name,
        "image": settings.image,
        "imagePullPolicy": settings.image_pull_policy,
        "command": list(command),
        "env": _variables(settings, board),
        "resources": {"requests": amounts, "limits": dict(amounts)},
        "volumeMounts": mounts,
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",  # the job as a whole starts again: see the policies
        "terminationGracePeriodSeconds": settings.grace_s,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": settings.user_id,
            "runAsGroup": settings.user_id,
            "fsGroup": settings.user_id,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": volumes,
    }
    if settings.service_account:
        pod["serviceAccountName"] = settings.service_account
    else:
        pod["automountServiceAccountToken"] = False
    if settings.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": secret} for secret in settings.image_pull_secrets]
    if settings.node_selector:
        pod["nodeSelector"] = dict(settings.node_selector)
    if settings.tolerations:
        pod["tolerations"] = [dict(item) for item in settings.tolerations]
    return pod


def _variables(settings: VolcanoConfig, board: str) -> list[dict[str, Any]]:
    # A pod gets several signals for one request to end; see mgm_exp.signals.
    plain: dict[str, str] = {"MGM_EXP_STOP_ONCE": "1", "MGM_EXP_WAIT": "1", "HOME": "/tmp", **settings.env}
    if settings.nodes > 1:
        plain["MGM_EXP_BOARD"] = board
    variables: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in plain.items()]
    for place in settings.env_from:
        secret, _, key = place.partition("/")
        variables.append({"name": key, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}})
    return variables


def _gib(amount: float) -> str:
    """``64Gi``; what is no whole number of GiB in MiB."""
    return f"{int(amount)}Gi" if amount == int(amount) else f"{int(amount * 1024)}Mi"


def as_yaml(manifest: Mapping[str, Any]) -> str:
    """A manifest as a YAML document."""
    import yaml

    return "---\n" + yaml.safe_dump(dict(manifest), sort_keys=False, width=120)
