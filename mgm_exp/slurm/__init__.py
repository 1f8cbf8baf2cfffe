"""Slurm: the scripts that are submitted, what becomes of the jobs, and what runs on the node.

Knows jobs and run folders, not experiments: :mod:`mgm_exp.slurm_slots` brings the two together.
"""

from __future__ import annotations

from .script import render_script
from .settings import ContainerConfig, ContainerRuntime, SlurmConfig, settings_of

__all__ = ["ContainerConfig", "ContainerRuntime", "SlurmConfig", "render_script", "settings_of"]
