"""What a Slurm job is given: the keys of ``hydra.launcher`` with ``hydra/launcher=slurm``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from mgm_exp.errors import ConfigError

TARGET = "hydra_plugins.mgm_exp_plugins.slurm_launcher.MgmSlurmLauncher"


class ContainerRuntime(Enum):
    """Who runs the container image of a job; ``none``: the job runs on the node as it is."""

    none = "none"
    apptainer = "apptainer"
    enroot = "enroot"


@dataclass
class ContainerConfig:
    """An image in which the run takes place. Slurm's own commands are called outside of it."""

    runtime: ContainerRuntime = ContainerRuntime.none
    # A file (.sif for Apptainer, .sqsh for Enroot) or whatever else the runtime takes as an image.
    image: str | None = None
    # Folders that the image is to see, as HOST:INSIDE or HOST (the same place). The sweep's folder and the code are
    # added by themselves; data, models and the store are not.
    mounts: list[str] = field(default_factory=list)
    # Further options of `apptainer exec` or `enroot start`.
    options: list[str] = field(default_factory=list)
    # The interpreter in the image.
    python: str = "python"


@dataclass
class SlurmConfig:
    """One job of a sweep. What is null is left to the cluster's defaults."""

    _target_: str = TARGET
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    # Features that a node must have, such as "a100|h100".
    constraint: str | None = None
    # Minutes of one stretch. A run that needs more saves its state, goes back into the queue and continues: shorter
    # stretches start sooner (backfill) and cost a start each.
    timeout_min: int = 60
    # Seconds before the end of the stretch at which the run is told to save. More is needed for large checkpoints on
    # slow disks; less wastes less. null: 120, but at most a quarter of the stretch.
    signal_delay_s: int | None = None
    # How often a run may go back into the queue because its time was up, or SIGUSR2 said so. Preemptions and lost nodes
    # do not count.
    max_requeues: int = 20
    # Machines of one run. One process runs on the first of them and starts the others' processes from there.
    nodes: int = 1
    # GPUs on each node. null: none are asked for.
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    # GiB of host memory on each node.
    mem_gb: float | None = None
    # Trials of a grid that run at the same time. null: as many as the cluster has room for. A search has sweep.slots.
    array_parallelism: int | None = None
    # Lines of bash before the run: modules, conda, variables.
    setup: list[str] = field(default_factory=list)
    # Any other option of sbatch by its long name, such as {mail-type: END}; true for one without a value.
    additional_parameters: dict[str, Any] = field(default_factory=dict)
    container: ContainerConfig = field(default_factory=ContainerConfig)
    # The interpreter on the nodes. null: the one that submits (or, with a container, the node's python3).
    python: str | None = None
    # Jobs run from a copy of the code and the presets, made at submission: editing the checkout changes no queued job.
    snapshot: bool = True
    # Whether jobs inherit the variables that hold secrets (WANDB_API_KEY, HF_TOKEN). They travel in Slurm's own
    # environment of the job and never stand in a file of the sweep; false: they stay here.
    secrets: bool = True

    @property
    def warning_s(self) -> int:
        """Seconds between the warning and the end of the stretch."""
        if self.signal_delay_s is not None:
            return self.signal_delay_s
        return min(120, self.timeout_min * 60 // 4)


# What is said elsewhere in this class, and would be said twice.
_TAKEN = {
    "job-name": "sweep.name",
    "array": "hydra.launcher.array_parallelism",
    "output": "the run folder's output.txt",
    "error": "the run folder's output.txt",
    "time": "hydra.launcher.timeout_min",
    "nodes": "hydra.launcher.nodes",
    "ntasks": "nothing: one process runs on the first node",
    "ntasks-per-node": "nothing: one process runs on the first node",
    "partition": "hydra.launcher.partition",
    "account": "hydra.launcher.account",
    "qos": "hydra.launcher.qos",
    "constraint": "hydra.launcher.constraint",
    "signal": "hydra.launcher.signal_delay_s",
    "no-requeue": "hydra.launcher.max_requeues=0",
    "open-mode": "nothing: logs are appended",
    "comment": "nothing: a lost job is found again by it",
    "export": "hydra.launcher.secrets",
    "chdir": "nothing: paths are relative to where the sweep was started",
}


def settings_of(launcher: Mapping[str, Any]) -> SlurmConfig:
    """The checked settings of a composed ``hydra.launcher`` node (or of a launcher's arguments).

    Raises:
        ConfigError: naming every fault: what was given, what is allowed, what to do.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    given = OmegaConf.create(dict(launcher))
    try:
        merged = OmegaConf.merge(OmegaConf.structured(SlurmConfig), given)
        settings = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        message = str(error).splitlines()[0]
        raise ConfigError(f"hydra.launcher: {message}.", advice="docs/slurm.md lists its keys.") from error
    assert isinstance(settings, SlurmConfig)
    faults = list(_faults(settings))
    if faults:
        raise ConfigError("; ".join(faults) + ".")
    return settings


def _faults(settings: SlurmConfig) -> Iterator[str]:
    for key in ("timeout_min", "nodes", "gpus_per_node", "cpus_per_task", "mem_gb", "array_parallelism"):
        value = getattr(settings, key)
        if value is not None and not 0 < value < float("inf"):
            yield f"hydra.launcher.{key}={value} must be a finite number above 0"
    if settings.max_requeues < 0:
        yield f"hydra.launcher.max_requeues={settings.max_requeues} must be 0 or above"
    if not 0 < settings.warning_s < settings.timeout_min * 60:
        yield (
            f"hydra.launcher.signal_delay_s={settings.signal_delay_s} must lie between 0 and the "
            f"{settings.timeout_min * 60} s of hydra.launcher.timeout_min={settings.timeout_min}"
        )
    for key, text in _texts(settings):
        if "\n" in text or "\r" in text or "\0" in text:
            yield f"hydra.launcher.{key} has a line break in {text!r}; give one line"
    for name, value in settings.additional_parameters.items():
        plain = str(name).replace("_", "-").lstrip("-")
        if plain in _TAKEN:
            yield f"hydra.launcher.additional_parameters has {name!r}, for which there is {_TAKEN[plain]}"
        if isinstance(value, (dict, list)):
            yield f"hydra.launcher.additional_parameters.{name}={value!r} must be a text, a number or true"
    yield from _container_faults(settings.container)


def _texts(settings: SlurmConfig) -> Iterator[tuple[str, str]]:
    container = settings.container
    for key in ("partition", "account", "qos", "constraint", "python"):
        yield key, getattr(settings, key) or ""
    yield from (("setup", line) for line in settings.setup)
    yield from (("container.mounts", mount) for mount in container.mounts)
    yield from (("container.options", option) for option in container.options)
    yield "container.image", container.image or ""
    yield "container.python", container.python
    for name, value in settings.additional_parameters.items():
        yield "additional_parameters", f"{name}={value}"


def _container_faults(container: ContainerConfig) -> Iterator[str]:
    is_on = container.runtime is not ContainerRuntime.none
    if is_on and not container.image:
        yield f"hydra.launcher.container.runtime={container.runtime.value} needs hydra.launcher.container.image"
    if not is_on and (container.image or container.mounts or container.options):
        yield "hydra.launcher.container has settings but no runtime; give runtime=apptainer or enroot"
