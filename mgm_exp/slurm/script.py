"""The batch script of one submission, as text: nothing is submitted and no Slurm is needed.

submitit renders the ``#SBATCH`` lines. What runs is a small process of ours (:mod:`mgm_exp.slurm.job`): it takes its
trial from ``submission.json`` beside the script and starts one process on the first node. Processes on further nodes
are started from inside, as steps of the same allocation (``srun``), which nothing in the script stands in the way of.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mgm_exp.errors import ConfigError
from mgm_exp.slurm.settings import ContainerRuntime, SlurmConfig

JOB = Path(__file__).with_name("job.py")
# Enroot hands nothing of the environment on by itself.
_ENROOT_VARIABLES = (
    "PYTHONPATH PYTHONSAFEPATH PYTHONUNBUFFERED OMP_NUM_THREADS CUDA_VISIBLE_DEVICES MGM_EXP_STOP_ONCE MGM_EXP_WAIT "
    "WANDB_API_KEY WANDB_BASE_URL HF_TOKEN HF_HOME SLURM_JOB_ID SLURM_JOB_NODELIST SLURM_JOB_NUM_NODES SLURM_NODEID "
    "SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID SLURM_RESTART_COUNT"
).split()


def render_script(
    settings: SlurmConfig,
    *,
    name: str,
    folder: Path,
    program: Sequence[str],
    runs: Sequence[tuple[Path, Sequence[str]]],
    is_array: bool = False,
    code: Path | None = None,
) -> str:
    """The text that ``sbatch`` is given.

    Args:
        settings: ``hydra.launcher``; see :func:`mgm_exp.slurm.settings_of`.
        name: The job's name.
        folder: Of the submission: what the job reads, and Slurm's own log.
        program: The command line that runs one experiment, without its overrides.
        runs: Run folder and overrides of each task, in the order of ``submission.json``.
        is_array: One task for each of them; else there is one run and one plain job.
        code: A copy of the code that the jobs are to use; None: the code as it lies here.

    Raises:
        ConfigError: sbatch could not take an option, or the script would hold a secret.
    """
    if not is_array and len(runs) != 1:
        raise ValueError(f"{len(runs)} runs need an array")
    job = JOB if code is None else code / "mgm_exp" / "slurm" / "job.py"
    lines = [*settings.setup, *_exports(code), "", *_described(runs)]
    run = _run(settings, program, folder, code)
    command = shlex.join(["exec", _python(settings), str(job), str(folder), "--", *run])
    parameters: dict[str, Any] = {
        "job_name": name,
        "comment": f"mgm_exp {folder}",
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "constraint": settings.constraint,
        "time": settings.timeout_min,
        "mem": None if settings.mem_gb is None else f"{math.ceil(settings.mem_gb * 1024)}M",
        "nodes": settings.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": settings.cpus_per_task,
        "gpus_per_node": settings.gpus_per_node,
        "stderr_to_stdout": True,
        "use_srun": False,
        "setup": lines,
        "additional_parameters": {
            # B: the batch script alone, which passes it on to the run; the run's helpers need not know.
            "signal": f"B:USR2@{settings.warning_s}",
            "requeue": True,
            "export": "ALL",
            "output": str(folder).replace("%", "%%") + ("/%A_%a.out" if is_array else "/%j.out"),
            **{str(key).lstrip("-").replace("_", "-"): value for key, value in settings.additional_parameters.items()},
        },
    }
    size = len(runs) if is_array else None
    text = _by_submitit(folder, {k: v for k, v in parameters.items() if v is not None}, command, size, settings)
    return _without_secrets(text)


def _by_submitit(
    folder: Path, parameters: dict[str, Any], command: str, size: int | None, settings: SlurmConfig
) -> str:
    from submitit import SlurmExecutor

    class Renderer(SlurmExecutor):  # type: ignore[misc]
        """submitit's, on a machine without Slurm, too."""

        @classmethod
        def affinity(cls) -> int:
            return 1

    renderer = Renderer(folder=folder)
    # Clusters that do not know this key refuse it, and submitit names one unless it is told otherwise.
    renderer.update_parameters(**parameters)
    if size is not None:
        renderer.parameters["map_count"] = size
        renderer.parameters["array_parallelism"] = settings.array_parallelism or size
    text = renderer._make_submission_file_text(command, "")
    lines = [line for line in text.splitlines() if not line.startswith("#SBATCH --wckey=")]
    return "\n".join(lines) + "\n"


def _python(settings: SlurmConfig) -> str:
    if settings.python is not None:
        return settings.python
    return sys.executable if settings.container.runtime is ContainerRuntime.none else "python3"


def _exports(code: Path | None) -> list[str]:
    """Variables that the script itself sets, after the setup lines, so that modules cannot put other code first."""
    if code is None:
        return ["export PYTHONUNBUFFERED=1"]
    paths = shlex.quote(os.pathsep.join([str(code), str(code / "launcher")]))
    # Safe path: nothing is imported from the folder in which the job starts, which is often the checkout.
    return [
        "export PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1",
        f'export PYTHONPATH={paths}"${{PYTHONPATH:+{os.pathsep}$PYTHONPATH}}"',
    ]


def _run(settings: SlurmConfig, program: Sequence[str], folder: Path, code: Path | None) -> list[str]:
    """The command line of one experiment, in its container where there is one."""
    own = list(program)
    container = settings.container
    if own and own[0] == sys.executable and container.runtime is not ContainerRuntime.none:
        own[0] = container.python
    elif own and own[0] == sys.executable and settings.python is not None:
        own[0] = settings.python
    if container.runtime is ContainerRuntime.none:
        return own
    sweep = folder.parent.parent
    mounts = [f"{path}:{path}" for path in dict.fromkeys([sweep, *([code] if code else [])])]
    mounts += [mount if ":" in mount else f"{mount}:{mount}" for mount in container.mounts]
    if container.runtime is ContainerRuntime.apptainer:
        gpus = ["--nv"] if settings.gpus_per_node else []
        binds = [item for mount in mounts for item in ("--bind", mount)]
        return ["apptainer", "exec", *gpus, *binds, *container.options, str(container.image), *own]
    binds = [item for mount in mounts for item in ("--mount", mount)]
    variables = [item for name in _ENROOT_VARIABLES for item in ("--env", name)]
    return ["enroot", "start", *binds, *variables, *container.options, str(container.image), *own]


def _described(runs: Sequence[tuple[Path, Sequence[str]]]) -> list[str]:
    """What each task does, for who reads the script; the job itself reads ``submission.json``."""
    shown = []
    for number, (run_dir, overrides) in enumerate(runs):
        words = " ".join(shlex.quote(item) for item in overrides)
        shown.append("# " + re.sub(r"[\x00-\x1f\x7f]", " ", f"task {number}: {run_dir}: {words}"))
    return shown


def _without_secrets(text: str) -> str:
    from mgm_exp.record import redact_text  # here: the schema of this launcher is loaded with every command

    for number, line in enumerate(text.splitlines(), 1):
        hidden = redact_text(line)
        if hidden != line:
            raise ConfigError(
                f"line {number} of the job script would hold a secret: {hidden}",
                advice="Others can read scripts. Put it into the environment: hydra.launcher.secrets hands it on.",
            )
    return text
