"""Main memory that a run needs: what is offloaded, copies of checkpoints, batches that wait, caches.

Sums over all processes of one machine. Python with its packages is an estimate; the rest follows from sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

from mgm_exp.config import ExperimentConfig
from mgm_exp.plan.activations import layers
from mgm_exp.plan.architecture import Architecture
from mgm_exp.plan.memory import GIB
from mgm_exp.plan.stage_plan import StagePlan

# Python, torch and CUDA's libraries in a process; a process that reads images is forked and shares most of them.
_PROCESS_GIB, _READER_GIB = 2.0, 0.2
# Of fp32 masters, both moments and the gradients that they are updated with.
_OFFLOADED = 16
# Of weights and both moments, in fp32.
_STATE = 12
# Batches that each reading process has ready: torch's own number.
_READY = 2


def host_gib(config: ExperimentConfig, sizes: Architecture, stages: Sequence[StagePlan]) -> dict[str, float]:
    """GiB by component, and their highest sum as ``peak``; what a later moment lets go is not added to an earlier one.

    ``processes`` Python; ``offload`` ZeRO's masters, moments and gradients; ``activations`` that wait there;
    ``batches`` of a step, decoded; ``checkpoint`` the first process's copy that is written; ``resume`` what every
    process reads to go on; ``images`` of an evaluation.
    """
    devices = config.devices
    training = [stage for stage in stages if stage.name != "features"]
    offload = max((_OFFLOADED * s.parameters.trainable for s in training if s.work.offload), default=0.0)
    kept = max((devices * _activations(sizes, s) for s in training if s.work.offloads), default=0.0)
    batches = max(devices * _batches(config, s) for s in stages)
    state = max((_STATE * s.parameters.trainable for s in training), default=0.0)
    found = {
        "processes": devices * (_PROCESS_GIB + _READER_GIB * config.train.workers),
        "offload": offload / GIB,
        "activations": kept / GIB,
        "batches": batches / GIB,
        "checkpoint": state / GIB,
        "resume": devices * state / GIB,
        "images": config.eval.image_cache_gib,
    }
    steps = sum(found[name] for name in ("offload", "activations", "batches", "checkpoint"))
    peak = found["processes"] + max(steps, found["offload"] + found["resume"], found["images"])
    return {**{name: round(value, 4) for name, value in found.items()}, "peak": round(peak, 4)}


def _activations(sizes: Architecture, stage: StagePlan) -> float:
    """What blocks keep on the device where it does not wait on the host."""
    from dataclasses import replace

    there = layers(sizes, replace(stage.work, offloads=False)).saved
    return max(0.0, there - layers(sizes, stage.work).saved)


def _batches(config: ExperimentConfig, stage: StagePlan) -> float:
    """Decoded images of one process: of a whole step, and what reading processes have ready."""
    if not stage.work.encodes_images:
        return 0.0
    samples = stage.work.batch * (stage.work.accumulation + _READY * config.train.workers)
    return samples * stage.work.pixel_bytes
