"""kubectl, as far as jobs of Volcano need it. Who may do what is a matter of kubectl's own configuration."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass

from mgm_exp.errors import MgmError, MissingDependencyError

KIND = "jobs.batch.volcano.sh"
_ENDED = ("Completed", "Failed", "Terminated", "Aborted")


class ClusterAway(MgmError):
    """The cluster does not answer, or refuses."""


@dataclass(frozen=True)
class JobPhase:
    """Where a job is.

    Args:
        phase: As Volcano calls it; ``Pending`` where nothing was said yet.
        message: Its reason.
    """

    phase: str
    message: str = ""

    @property
    def has_ended(self) -> bool:
        return self.phase in _ENDED


class Kubectl:
    """The jobs of one namespace.

    Raises:
        MissingDependencyError: There is no kubectl.
    """

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        if shutil.which("kubectl") is None:
            raise MissingDependencyError(
                "hydra/launcher=volcano submits through kubectl, which is not on PATH.",
                advice="Install it and log in to the cluster; `mgm-exp launch --dry-run ...` prints the manifests.",
            )

    def apply(self, manifest: str) -> None:
        """Creates a job."""
        self._call("apply", "-f", "-", text=manifest)

    def phases(self, label: str) -> dict[str, JobPhase]:
        """Job -> where it is, of all with a label."""
        found = json.loads(self._call("get", KIND, "-l", label, "-o", "json"))
        return {item["metadata"]["name"]: _phase(item) for item in found["items"]}

    def delete(self, name: str) -> None:
        """Ends a job, whose pods may save their state first, and waits until it is gone."""
        self._call("delete", KIND, name, "--ignore-not-found=true", "--wait=true", timeout_s=900)

    def _call(self, *arguments: str, text: str = "", timeout_s: float = 120) -> str:
        command = ["kubectl", f"--namespace={self._namespace}", *arguments]
        try:
            done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise ClusterAway(f"kubectl {arguments[0]} did not answer in {timeout_s:g} s.") from error
        if done.returncode:
            said = done.stderr.strip().splitlines()
            raise ClusterAway(
                f"kubectl {arguments[0]} failed: {said[-1] if said else f'exit code {done.returncode}'}.",
                advice="See that `kubectl get vcjob` works here and that Volcano is installed in the cluster.",
            )
        return done.stdout


def _phase(item: dict) -> JobPhase:  # type: ignore[type-arg]
    state = (item.get("status") or {}).get("state") or {}
    words = " ".join(filter(None, (state.get("reason"), state.get("message"))))
    return JobPhase(state.get("phase") or "Pending", words)
