"""The trials of a sweep as Volcano jobs in a Kubernetes cluster, one job a trial; Volcano shares out the machines.

Results come back over the volume: this machine and the pods see the sweep's folder at the same path. A job outlives
the command that submitted it; the same command finds it by its name and goes on with it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path

from mgm_exp.config import ExperimentConfig
from mgm_exp.errors import ConfigError
from mgm_exp.search.outcome import Ending
from mgm_exp.search.reports import sweep_folder
from mgm_exp.slots import Slots, Work, run_arguments_of
from mgm_exp.volcano import LABEL, JobPhase, Kubectl, VolcanoConfig, as_yaml, job_name, render_job
from mgm_exp.volcano.kubectl import ClusterAway
from mgm_exp.volcano.manifest import sweep_label

_LAUNCHER = re.compile(r"\+{0,2}hydra[./]launcher[.=]")
# Jobs in the queue at the same time, where sweep.slots does not say.
DEFAULT_SLOTS = 4
ASK_S = 5.0
# A cluster that does not answer for so long ends the sweep; its jobs go on.
AWAY_S = 900.0


def manifest_of(settings: VolcanoConfig, config: ExperimentConfig, work: Work) -> str:
    """The job of one run, as YAML."""
    folder = sweep_folder(work.run_dir)
    name = job_name(config.sweep.name or folder.name, folder, work.number)
    if len(suffix := work.run_dir.relative_to(folder).parts) > 1:  # a seed of a trial
        name += f"-{suffix[-1].replace('_', '-')}"
    # Where the run is started is settled; the image need not have the presets that settled it.
    overrides = [item for item in run_arguments_of(work) if not _LAUNCHER.match(item)]
    manifest = render_job(
        settings, name=name, sweep=folder, run_dir=work.run_dir, overrides=overrides, devices=config.devices
    )
    return as_yaml(manifest)


class VolcanoSlots(Slots):
    """See the module.

    Args:
        settings: ``hydra.launcher``.
        config: Of the sweep.
        kubectl: Reaches the cluster.
    """

    are_here = False

    def __init__(self, settings: VolcanoConfig, config: ExperimentConfig, kubectl: Kubectl) -> None:
        self.size = config.sweep.slots or DEFAULT_SLOTS
        self._settings, self._config, self._kubectl = settings, config, kubectl
        self._running: dict[str, Work] = {}
        self._asked_at = 0.0
        self._heard_at = time.monotonic()

    @property
    def busy(self) -> int:
        return len(self._running)

    def start(self, work: Work) -> None:
        import yaml

        manifest = manifest_of(self._settings, self._config, work)
        name = yaml.safe_load(manifest)["metadata"]["name"]
        before = self._kubectl.phases(self._label(work.run_dir)).get(name)
        if before is not None and before.has_ended:  # of an earlier call: its name is needed again
            self._kubectl.delete(name)
            before = None
        if before is None:
            self._kubectl.apply(manifest)
        self._running[name] = work
        self._heard_at = time.monotonic()

    def _label(self, run_dir: Path) -> str:
        return f"{LABEL}={sweep_label(sweep_folder(run_dir))}"

    def ended(self, timeout_s: float) -> list[tuple[Work, Ending]]:
        if not self._running:
            return []
        wait_s = self._asked_at + ASK_S - time.monotonic()
        if wait_s > 0:
            time.sleep(min(wait_s, max(timeout_s, 0.0)))
            if wait_s > timeout_s:
                return []
        self._asked_at = time.monotonic()
        label = self._label(next(iter(self._running.values())).run_dir)
        try:
            phases = self._kubectl.phases(label)
        except ClusterAway:
            if time.monotonic() - self._heard_at > AWAY_S:
                raise
            return []
        self._heard_at = time.monotonic()
        over = [name for name in self._running if name not in phases or phases[name].has_ended]
        return [(self._running.pop(name), _ending(name, phases.get(name))) for name in over]

    def stop(self) -> list[tuple[Work, Ending]]:
        found = []
        for name in list(self._running):
            self._kubectl.delete(name)
            found.append((self._running.pop(name), Ending(130)))
        return found


def _ending(name: str, phase: JobPhase | None) -> Ending:
    """How a job ended. What its run left in its folder says more; this is for the case that it left nothing."""
    if phase is None:
        return Ending(None, how=f"its Volcano job {name} was deleted from the cluster")
    if phase.phase == "Completed":
        return Ending(0)
    words = f": {phase.message}" if phase.message else ""
    return Ending(1, how=f"its Volcano job {name} is {phase.phase}{words}")


def slots_of(settings: VolcanoConfig, config: ExperimentConfig, program: Sequence[str]) -> VolcanoSlots:
    """The slots of a sweep with this configuration.

    Raises:
        MissingDependencyError: There is no kubectl.
        ConfigError: The sweep brings presets of its own, which the image does not have.
    """
    if "--config-dir" in program:
        raise ConfigError(
            "hydra/launcher=volcano runs what is in the image, which has no --config-dir.",
            advice="Add the presets to the image, or write the keys into the command.",
        )
    return VolcanoSlots(settings, config, Kubectl(settings.namespace))
