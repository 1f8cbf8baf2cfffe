"""Slurm: the scripts that are submitted, what becomes of the jobs, and what runs on the node.

Knows jobs and run folders, not experiments: :mod:`mgm_exp.slurm_slots` brings the two together.
"""

from __future__ import annotations

from .commands import JobState, Slurm, SlurmAway, check_commands
from .listing import living_jobs
from .script import render_script
from .settings import ContainerConfig, ContainerRuntime, SlurmConfig, settings_of
from .snapshot import copy_presets, snapshot
from .submissions import FOLDER, Submission, Task, latest_of

__all__ = [
    "FOLDER",
    "ContainerConfig",
    "ContainerRuntime",
    "JobState",
    "Slurm",
    "SlurmAway",
    "SlurmConfig",
    "Submission",
    "Task",
    "check_commands",
    "copy_presets",
    "latest_of",
    "living_jobs",
    "render_script",
    "settings_of",
    "snapshot",
]
