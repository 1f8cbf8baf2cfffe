"""How fast this machine multiplies matrices of the model's own shapes: seconds of measuring in place of a data sheet.

What comes out is an upper bound for training: loading, small kernels and communication come on top. Finished runs say
more (:mod:`mgm_exp.plan.calibration`), and are preferred where there are some.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mgm_exp.errors import MgmError
from mgm_exp.plan.architecture import Architecture
from mgm_exp.store import read_record, write_json_atomic

FILE = "machine.json"


@dataclass(frozen=True)
class Probe:
    """What was measured.

    Args:
        machine: The device's name, as a manifest has it.
        precision: ``bf16`` or ``fp32``.
        flops_per_s: Operations a second of one device, forward and backward, the median of the rounds.
        threads: Of the CPU; 0 on a GPU.
    """

    machine: str
    precision: str
    flops_per_s: float
    threads: int

    def save(self, root: Path) -> None:
        """Keeps it as ``<paths.root>/machine.json``."""
        root.mkdir(parents=True, exist_ok=True)
        write_json_atomic(root / FILE, {"schema_version": 1, **vars(self)})


def read_probe(root: Path, machine: str, precision: str, threads: int) -> Probe | None:
    """What was measured before on this machine in this precision; None where nothing was."""
    try:
        found = read_record(root / FILE)
        probe = Probe(found["machine"], found["precision"], float(found["flops_per_s"]), int(found["threads"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    is_same = (probe.machine, probe.precision, probe.threads) == (machine, precision, threads)
    return probe if is_same and probe.flops_per_s > 0 else None


def measure(
    sizes: Architecture,
    machine: str,
    precision: str,
    *,
    tokens: int,
    seconds: float = 20.0,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Probe:
    """Multiplies the linear layers of one block of the LLM, forward and backward, for so long.

    Args:
        sizes: The model's.
        machine: The device's name.
        precision: ``bf16`` or ``fp32``.
        tokens: Rows of the inputs: samples x tokens of a pass.
        seconds: How long.
        on_progress: Told (what, seconds done, seconds in all).

    Raises:
        MgmError: the card has not enough memory for one block.
    """
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    names = [name for name in sizes.shapes if name.startswith("model.layers.0.") and name.endswith("_proj.weight")]
    try:
        weights = [torch.randn(sizes.shapes[name], device=device, dtype=dtype) for name in names]
        inputs = {
            weight.shape[1]: torch.randn(tokens, weight.shape[1], device=device, dtype=dtype) for weight in weights
        }
    except torch.OutOfMemoryError as error:
        raise MgmError(f"The probe's block of the model does not fit on {machine}: {error}") from error
    # Forward and the gradient of the input: what a frozen layer costs
    operations = sum(2 * 2 * tokens * weight.numel() for weight in weights)
    speeds: list[float] = []
    begun = time.perf_counter()
    while not speeds or time.perf_counter() - begun < seconds:
        started = time.perf_counter()
        for weight in weights:
            (inputs[weight.shape[1]] @ weight.T) @ weight
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        speeds.append(operations / (time.perf_counter() - started))
        on_progress("measuring this machine", round(min(seconds, time.perf_counter() - begun)), round(seconds))
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    return Probe(machine, precision, sorted(speeds)[len(speeds) // 2], threads)
