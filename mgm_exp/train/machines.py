"""On which machines the processes of a stage run: this one, those of a hostfile, of a Slurm job, of a Volcano job.

One command runs the experiment, on the first machine. What it needs to know of the others is their names in order, how
many processes each one takes, and an address of the first one that all of them reach.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from mgm_exp.config import ExperimentConfig, Machines
from mgm_exp.errors import ConfigError, MissingDependencyError

# Environment variables by which the pods of a Volcano job find one another: the svc plugin sets the first two (tasks
# ``main`` and ``node`` of the job), the manifest the third.
VOLCANO_MAIN, VOLCANO_OTHERS, VOLCANO_BOARD = "VC_MAIN_HOSTS", "VC_NODE_HOSTS", "MGM_EXP_BOARD"
_HOST_LINE = re.compile(r"(?P<host>[A-Za-z0-9][\w.:-]*?)(?:\s+slots\s*=\s*(?P<slots>\d+)|:(?P<count>\d+))?(?:\s+.*)?")


class Reach(Enum):
    """How the first machine starts processes on the others."""

    here = "here"
    shell = "shell"
    slurm = "slurm"
    volcano = "volcano"


@dataclass(frozen=True)
class Cluster:
    """Where the processes of a stage run.

    Args:
        reach: How processes are started there.
        names: Of the machines; the first one is this one and holds the first ranks.
        per_machine: Processes on each.
        address: Of the first machine, as all of them reach it.
    """

    reach: Reach
    names: tuple[str, ...]
    per_machine: int
    address: str

    @property
    def size(self) -> int:
        return len(self.names)

    @property
    def is_loopback(self) -> bool:
        """Whether all of it is on this machine, whatever its machines are called."""
        try:
            found = {info[4][0] for info in socket.getaddrinfo(self.address, None)}
        except OSError:
            return False
        return all(str(address).startswith("127.") or address == "::1" for address in found)

    def machine_of(self, rank: int) -> str:
        return self.names[rank // self.per_machine]


def cluster_of(config: ExperimentConfig, environment: Mapping[str, str] = os.environ) -> Cluster:
    """The machines that ``devices`` processes run on.

    Raises:
        ConfigError: The processes do not divide over the machines, or this is not the first of them.
    """
    launch = config.launch
    if config.devices == 1 or launch.machines is Machines.here:
        return _here(config.devices)
    if launch.hostfile is not None:
        return _of_hostfile(Path(launch.hostfile), config.devices)
    if int(environment.get("SLURM_JOB_NUM_NODES", "1")) > 1:
        return _of_slurm(environment, config.devices)
    if environment.get(VOLCANO_OTHERS) and environment.get(VOLCANO_BOARD):
        names = [*_listed(environment[VOLCANO_MAIN]), *_listed(environment[VOLCANO_OTHERS])]
        return _shared(Reach.volcano, names, config.devices, names[0], "the Volcano job")
    return _here(config.devices)


def _here(devices: int) -> Cluster:
    return Cluster(Reach.here, (socket.gethostname(),), devices, "127.0.0.1")


def _shared(reach: Reach, names: list[str], devices: int, address: str, whose: str) -> Cluster:
    if devices % len(names):
        raise ConfigError(
            f"devices={devices} processes do not divide over the {len(names)} machines of {whose}: {', '.join(names)}.",
            advice=f"Give a multiple of {len(names)}, or launch.machines=here for this machine alone.",
        )
    if len(names) == 1:
        return _here(devices)
    return Cluster(reach, tuple(names), devices // len(names), address)


def _listed(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


# -- a hostfile ---------------------------------------------------------------------------------------------------


def read_hostfile(path: Path) -> dict[str, int | None]:
    """The machines of a hostfile in order, with the processes that each may take (None: not said).

    A line is ``host slots=N`` (DeepSpeed, Open MPI), ``host:N`` (MPICH) or ``host``; ``#`` begins a comment.

    Raises:
        ConfigError: It cannot be read; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"launch.hostfile={path} cannot be read ({error}).") from error
    found: dict[str, int | None] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _HOST_LINE.fullmatch(text)
        if match is None:
            raise ConfigError(f"{path}, line {number}: {text!r} is not 'host slots=N', 'host:N' or 'host'.")
        if match["host"] in found:
            raise ConfigError(f"{path}, line {number}: {match['host']} is named twice; give its slots in one line.")
        slots = match["slots"] or match["count"]
        found[match["host"]] = int(slots) if slots else None
    if not found:
        raise ConfigError(f"launch.hostfile={path} names no machine.")
    return found


def _of_hostfile(path: Path, devices: int) -> Cluster:
    slots = read_hostfile(path)
    names = list(slots)
    cluster = _shared(Reach.shell, names, devices, names[0], str(path))
    full = {name: count for name, count in slots.items() if count is not None and count < devices // len(names)}
    if full:
        raise ConfigError(
            f"devices={devices} over {len(names)} machines is {devices // len(names)} processes each, and {path} "
            f"allows {', '.join(f'{name} {count}' for name, count in full.items())}.",
            advice="Give fewer devices or more slots; every machine takes the same number.",
        )
    if not is_this_machine(names[0]):
        raise ConfigError(
            f"{path} begins with {names[0]}, which is not this machine ({socket.gethostname()}).",
            advice="Give the command on the first machine of the hostfile, or put this one first.",
        )
    return cluster


def is_this_machine(host: str) -> bool:
    """Whether a name or address is one of this machine's: only those can be listened on."""
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as probe:
                try:
                    probe.bind(address)
                    return True
                except OSError:
                    continue
    except OSError:
        return False
    return False


# -- a Slurm job --------------------------------------------------------------------------------------------------


def _of_slurm(environment: Mapping[str, str], devices: int) -> Cluster:
    listed = environment["SLURM_JOB_NODELIST"]
    names = _scontrol("show", "hostnames", listed).split()
    job = f"Slurm job {environment.get('SLURM_JOB_ID', '')}".strip()
    cluster = _shared(Reach.slurm, names, devices, "", job)
    here = environment.get("SLURMD_NODENAME")
    if here != names[0]:
        raise ConfigError(
            f"An experiment with devices={devices} in {job} over {listed} is run by one command on its first machine, "
            f"{names[0]}; this is {here or f'{socket.gethostname()}, outside of the job'}.",
            advice="Start it once: in the batch script without srun, or with srun --nodes=1 --ntasks=1 --overlap.",
        )
    address = _address_of_node(_scontrol("show", "node", "-o", names[0]), names[0])
    return Cluster(cluster.reach, cluster.names, cluster.per_machine, address)


def _address_of_node(shown: str, name: str) -> str:
    """The address that Slurm itself reaches a node by: its name need not be one that the network knows."""
    match = re.search(r"\bNodeAddr=(\S+)", shown)
    return match[1] if match else name


def _scontrol(*arguments: str) -> str:
    try:
        done = subprocess.run(["scontrol", *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MissingDependencyError(
            f"This is a Slurm job over several machines, and scontrol does not answer ({error}).",
            advice="Put Slurm's programs on PATH, or give launch.machines=here for this machine alone.",
        ) from error
    if done.returncode:
        raise MissingDependencyError(f"scontrol {' '.join(arguments)} failed: {done.stderr.strip()}.")
    return done.stdout
