"""The GPUs of this machine by name, and how they are dealt out to the slots of a sweep. Torch is not needed for it."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from mgm_exp.errors import ConfigError

_GPU = re.compile(r"^GPU \d+: .*\(UUID: (?P<uuid>[\w-]+)\)")
_MIG = re.compile(r"^\s+MIG .*\(UUID: (?P<uuid>MIG-[\w/-]+)\)")


def visible_gpus() -> list[str]:
    """The GPUs that a child may be given, as CUDA_VISIBLE_DEVICES names them.

    Those that this process was given; else those that ``nvidia-smi`` lists, by UUID (numbers may mean other GPUs to
    CUDA than to nvidia-smi), MIG instances in place of the GPU that is cut into them; else those in ``/dev``.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip() and name.strip() != "-1"]
    in_dev = [str(number) for number, _ in enumerate(sorted(Path("/dev").glob("nvidia[0-9]*")))]
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return in_dev
    return parse_listing(done.stdout) if done.returncode == 0 else in_dev


def parse_listing(text: str) -> list[str]:
    """The names in what ``nvidia-smi -L`` prints."""
    names: list[str] = []
    whole = ""  # a GPU that may turn out to be cut into MIG instances
    for line in text.splitlines():
        if gpu := _GPU.match(line):
            whole = gpu["uuid"]
            names.append(whole)
        elif instance := _MIG.match(line):
            if whole in names:
                names.remove(whole)
            names.append(instance["uuid"])
    return names


def dealt(gpus: Sequence[str], slots: int, devices: int, *, share: bool) -> list[list[str]]:
    """The GPUs of each slot; empty lists where there are none.

    Args:
        gpus: All that there are.
        slots: Places for trials.
        devices: GPUs of each.
        share: Whether two slots may have the same one.

    Raises:
        ConfigError: There are too few of them, or a trial would need several MIG instances.
    """
    if not gpus:
        return [[] for _ in range(slots)]
    if devices > 1 and any(name.startswith("MIG-") for name in gpus):
        raise ConfigError(
            f"devices={devices} on MIG instances: CUDA gives a process only one of them.",
            advice="Give devices=1, or switch MIG off on these GPUs.",
        )
    if devices > len(gpus):
        raise ConfigError(
            f"devices={devices} is more than the {len(gpus)} GPU(s) of this machine: {', '.join(gpus)}.",
            advice="Give fewer devices, or device=cpu.",
        )
    if slots * devices > len(gpus) and not share:
        raise ConfigError(
            f"{slots} slots with devices={devices} each need {slots * devices} GPUs, and there are {len(gpus)}.",
            advice=f"Give sweep.slots={len(gpus) // devices}, or let slots share GPUs, whose memory they then share, "
            "too: hydra/launcher=local hydra.launcher.share_gpus=true.",
        )
    return [[gpus[(slot * devices + number) % len(gpus)] for number in range(devices)] for slot in range(slots)]
