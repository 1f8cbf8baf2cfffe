"""Kubernetes through Volcano: the manifest of a job, its schema, and kubectl.

Knows manifests and run folders, not experiments: :mod:`mgm_exp.volcano_slots` brings the two together.
"""

from __future__ import annotations

from .kubectl import JobPhase, Kubectl
from .manifest import LABEL, as_yaml, job_name, render_job
from .schema import faults_of
from .settings import VolcanoConfig, settings_of

__all__ = [
    "LABEL",
    "JobPhase",
    "Kubectl",
    "VolcanoConfig",
    "as_yaml",
    "faults_of",
    "job_name",
    "render_job",
    "settings_of",
]
