"""Which runs train together, and how many of them share a pass: by what they are, and by predicted memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mgm_exp.config import CudaGraphs, Device, ExperimentConfig
from mgm_exp.packed.stories import Run
from mgm_exp.train.pack.compatible import likeness, why_alone

# Of what is free on the card: the rest is for fragments and workspaces.
_SHARE = 0.93
_GIB = 1024**3


@dataclass(frozen=True)
class PackOf:
    """Runs that train together.

    Args:
        width: Trials whose passes are taken together at most; None: all.
    """

    runs: list[Run]
    width: int | None = None


@dataclass(frozen=True)
class Needs:
    """Predicted memory of a pack's trial, in GiB.

    Args:
        base: The frozen weights, which all share.
        state: Weights, gradients and moments of what it trains, all the time.
        passing: Activations and what else there is during its pass.
    """

    base: float
    state: float
    passing: float


def packs_of(runs: Sequence[Run], say: Callable[[str], None], room_gib: float | None = None) -> list[PackOf]:
    """The packs, and the runs that train alone, in the order of their first runs.

    Args:
        say: Prints a line: who trains alone and why, and what memory allows.
        room_gib: Memory of the device; None: looked up, where it is a GPU.
    """
    alike: dict[str, list[Run]] = {}
    for place, run in enumerate(runs):
        why = why_alone(run.config)
        if why is not None:
            say(f"pack: {run.run_dir.name} trains alone: {why}")
        alike.setdefault(likeness(run.config) if why is None else f"alone {place}", []).append(run)
    found: list[PackOf] = []
    for group in alike.values():
        room = _room(group[0].config) if room_gib is None else room_gib
        found += [PackOf(group)] if room is None or len(group) == 1 else _fitting(group, room, say)
    return found


def _fitting(group: Sequence[Run], room: float, say: Callable[[str], None]) -> list[PackOf]:
    """Trials up to where their states leave no room for a pass; passes shared by as many as there is room for."""
    packs: list[PackOf] = []
    pack: list[Run] = []
    state = widest = 0.0
    for run in group:
        needs = needs_of(run.config)
        state, widest = state + needs.state, max(widest, needs.passing)
        if pack and needs.base + state + widest > room:
            packs.append(_pack(pack, room, say))
            pack, state, widest = [], needs.state, needs.passing
        pack.append(run)
    return [*packs, _pack(pack, room, say)]


def _pack(runs: list[Run], room: float, say: Callable[[str], None]) -> PackOf:
    needs = [needs_of(run.config) for run in runs]
    left = room - needs[0].base - sum(one.state for one in needs)
    width = max(1, min(len(runs), int(left / max(one.passing for one in needs))))
    if width < len(runs):
        say(f"pack: of {len(runs)} trials {width} share a pass: {room:.1f} GiB hold no more (predicted)")
    return PackOf(runs, width)


def needs_of(config: ExperimentConfig) -> Needs:
    """From the plan of the instruct stage."""
    from mgm_exp.plan import plan_cell

    stage = plan_cell(config, with_advice=False).stages[-1]
    # CUDA graphs write gradients to a place of their own
    state = (16.0 if config.train.cuda_graphs is CudaGraphs.none else 20.0) * stage.parameters.trainable
    base = max(moment.weights for moment in stage.moments) - 4.0 * stage.parameters.trainable
    passing = max(moment.activations + moment.logits + moment.buffers for moment in stage.moments)
    return Needs(base / _GIB, state / _GIB, passing / _GIB)


def _room(config: ExperimentConfig) -> float | None:
    """GiB that are free on the GPU; None on a CPU, whose memory is not the first thing to end."""
    if config.device is Device.cpu:
        return None
    from mgm_exp.train.ranks import compute_device

    device = compute_device(config.device, 0)
    if device.type != "cuda":
        return None
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return _SHARE * free / _GIB
