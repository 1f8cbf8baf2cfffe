"""What a Volcano job is given: the keys of ``hydra.launcher`` with ``hydra/launcher=volcano``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mgm_exp.errors import ConfigError

TARGET = "hydra_plugins.mgm_exp_plugins.volcano_launcher.MgmVolcanoLauncher"
_DNS_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PLACE = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z_][A-Za-z0-9_]*")
# Names of variables that hold what must not stand in a manifest.
_SECRET_WORDS = re.compile(r"(?i)(api_?key|token|secret|passw|credential)")


@dataclass
class VolcanoConfig:
    """One job of a sweep: a pod on each machine. What is null is left to the cluster's defaults."""

    _target_: str = TARGET
    namespace: str = "default"
    queue: str = "default"
    # Of the cluster. Higher ones are scheduled first, and may evict lower ones, which start again and continue.
    priority_class: str | None = None
    # Made from launcher/volcano/Dockerfile, by tag or digest: what a run prints and records depends on it.
    image: str | None = None
    image_pull_policy: str = "IfNotPresent"
    image_pull_secrets: list[str] = field(default_factory=list)
    # Machines of one run, a pod on each; they are scheduled together or not at all.
    nodes: int = 1
    # GPUs of each pod. null: none are asked for.
    gpus_per_node: int | None = None
    gpu_resource: str = "nvidia.com/gpu"
    cpus_per_node: int = 8
    # GiB of memory of each pod; requested and the limit: a pod above it is killed, and no other suffers.
    mem_gb: float = 64.0
    # GiB of /dev/shm, which loader workers and NCCL exchange data through; it counts as memory of the pod.
    shm_gb: float = 16.0
    # Claims (PVC) of volumes that all nodes can mount: where results go, and where data and models lie (read only).
    outputs_claim: str | None = None
    outputs_path: str = "/outputs"
    data_claim: str | None = None
    data_path: str = "/data"
    # Secrets that become variables, as secret/KEY: the variable KEY has the value that the Secret of the namespace
    # holds under that key. The value itself stands in no manifest.
    env_from: list[str] = field(default_factory=list)
    # Variable -> value, for what is not secret (NCCL_SOCKET_IFNAME, WANDB_BASE_URL).
    env: dict[str, str] = field(default_factory=dict)
    # How often Volcano starts the whole job again (eviction, a lost node); it continues from its checkpoints.
    max_retry: int = 3
    # Seconds after its end at which a job is deleted from the cluster; its results stay. null: never.
    ttl_s: int | None = 86_400
    # Seconds in which a pod that is evicted may save its state. More is needed for large checkpoints.
    grace_s: int = 120
    # The user that the pods run as; the image's is 10001.
    user_id: int = 10001
    service_account: str | None = None
    # Labels that a machine must have.
    node_selector: dict[str, str] = field(default_factory=dict)
    # Taints that may be ignored, as Kubernetes writes them: {key: gpu, operator: Exists, effect: NoSchedule}.
    tolerations: list[dict[str, str]] = field(default_factory=list)


def settings_of(launcher: Mapping[str, Any]) -> VolcanoConfig:
    """The checked settings of a composed ``hydra.launcher`` node (or of a launcher's arguments).

    Raises:
        ConfigError: naming every fault: what was given, what is allowed, what to do.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        merged = OmegaConf.merge(OmegaConf.structured(VolcanoConfig), OmegaConf.create(dict(launcher)))
        settings = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"hydra.launcher: {str(error).splitlines()[0]}.", advice="See docs/processes.md.") from error
    assert isinstance(settings, VolcanoConfig)
    faults = list(_faults(settings))
    if faults:
        raise ConfigError("; ".join(faults) + ".")
    return settings


def _faults(settings: VolcanoConfig) -> Iterator[str]:
    at = "hydra.launcher"
    for key in ("image", "outputs_claim"):
        if not getattr(settings, key):
            yield f"{at}.{key} is not given, and every Volcano job needs it"
    for key in ("nodes", "gpus_per_node", "cpus_per_node", "mem_gb", "shm_gb"):
        value = getattr(settings, key)
        if value is not None and not 0 < value < float("inf"):
            yield f"{at}.{key}={value} must be a finite number above 0"
    for key in ("max_retry", "ttl_s", "grace_s", "user_id"):
        value = getattr(settings, key)
        if value is not None and value < 0:
            yield f"{at}.{key}={value} must be 0 or above"
    if settings.user_id == 0:
        yield f"{at}.user_id=0 is root, and the pods do not run as root"
    if settings.shm_gb >= settings.mem_gb:
        yield (
            f"{at}.shm_gb={settings.shm_gb:g} counts as memory of the pod and must be below mem_gb={settings.mem_gb:g}"
        )
    names = ("namespace", "queue", "priority_class", "outputs_claim", "data_claim", "service_account")
    for key, value in [(key, getattr(settings, key)) for key in names] + [
        ("image_pull_secrets", name) for name in settings.image_pull_secrets
    ]:
        if value and not _DNS_NAME.fullmatch(value):
            yield f"{at}.{key}={value!r} is no name of Kubernetes: lower case letters, digits, - and ."
    if settings.image_pull_policy not in ("Always", "IfNotPresent", "Never"):
        yield f"{at}.image_pull_policy={settings.image_pull_policy!r}; allowed are Always, IfNotPresent and Never"
    for key in ("outputs_path", "data_path"):
        path = getattr(settings, key)
        if not path.startswith("/") or ":" in path or ".." in path.split("/"):
            yield f"{at}.{key}={path!r} must be an absolute path"
    yield from _variable_faults(settings, at)


def _variable_faults(settings: VolcanoConfig, at: str) -> Iterator[str]:
    for name, value in settings.env.items():
        if not _VARIABLE.fullmatch(name):
            yield f"{at}.env has {name!r}, which is no name of a variable"
        if _SECRET_WORDS.search(name):
            yield f"{at}.env.{name} looks like a secret: put it into a Secret and give {at}.env_from=[SECRET/{name}]"
        if re.search(r"://[^/@\s]*:[^/@\s]*@", value):
            yield f"{at}.env.{name} holds a password in a URL: put it into a Secret and name that in {at}.env_from"
    for place in settings.env_from:
        if not _PLACE.fullmatch(place):
            yield f"{at}.env_from takes secret/VARIABLE, the place of a value and not the value"
