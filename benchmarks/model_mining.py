"""Patch info mining at the size of MGM-2B, forward and backward: from native stages against the official form.

One image of 768 pixels: 576 patches of width 1,024, ConvNeXt stages of 192 to 1,536 channels at 192 to 24 pixels a
side, random; towers are frozen, the three projections are trained, fp32. The peer is `mgm_exp.model.mining.mine`, the
official code's operations, which the tests compare with its golden data, on the joined map, which has to be joined
first. CPU time of the process, one thread, alternated repeats; memory is PyTorch's own count of live tensors, of
another run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measurement import Row

REPEATS, REPEATS_QUICK = 2, 1
GOAL = 5.0
MIB = 1024**2
# How far the two may be apart, relative to the largest element of an output or gradient.
NEAR = 1e-5


def run(work: Path, quick: bool = False) -> list[Row]:
    """Time and memory of both forms."""
    import torch

    torch.set_num_threads(1)
    made = _part(*((6, 64, (12, 24, 48, 96)) if quick else (24, 1024, (192, 384, 768, 1536))))
    forms: dict[str, Callable[[], dict[str, Any]]] = {
        "ours": lambda: _step(*made, native=True),
        "peer": lambda: _step(*made, native=False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    found: dict[str, dict[str, Any]] = {}
    for repeat in range(REPEATS_QUICK if quick else REPEATS):
        for name in sorted(forms, reverse=repeat % 2 == 1):
            began = time.process_time()
            found[name] = forms[name]()
            seconds[name].append(time.process_time() - began)
    apart = max(_apart(found["ours"][name], found["peer"][name]) for name in found["peer"])
    exactness = (
        f"tolerance: output and gradients {'within' if apart <= NEAR else 'DIFFER:'} {apart:.1g} of the largest element"
    )
    ratios = [peer / ours for ours, peer in zip(seconds["ours"], seconds["peer"], strict=True)]
    evidence = f"one image, fp32, one thread, CPU time; ratios {', '.join(f'{ratio:.1f}' for ratio in ratios)}"
    memory = {name: _memory(form) / MIB for name, form in forms.items()}
    what = "patch info mining of one image, forward and backward"
    ours, peer = (statistics.median(seconds[name]) for name in ("ours", "peer"))
    return [
        Row(f"{what}: time", "s", ours, peer, None if quick else GOAL, exactness, evidence),
        Row(
            f"{what}: memory",
            "MiB",
            memory["ours"],
            memory["peer"],
            None,
            exactness,
            "most that is alive above the stages and the weights, gradients of the weights included",
        ),
    ]


def _part(side: int, width: int, widths: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """Patches, stages as the tower stores them, and the three projections, with nothing at its initial value."""
    import torch

    from mgm_exp.model.mining import projection

    draw = torch.Generator().manual_seed(0)
    low = torch.randn(1, side * side, width, generator=draw)
    stages = [
        torch.randn(1, channels, side * 8 >> i, side * 8 >> i, generator=draw).contiguous(
            memory_format=torch.channels_last
        )
        for i, channels in enumerate(widths)
    ]
    wide = sum(widths)
    projections = torch.nn.ModuleDict(
        {"query": projection(width, width), "aux": projection(wide, width), "val": projection(wide, width)}
    )
    with torch.no_grad():
        for parameter in projections.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
    return low, stages, projections


def _step(low: Any, stages: Any, projections: Any, native: bool) -> dict[str, Any]:
    """Forward and backward: output and gradients by name."""
    from mgm_exp.model.convnext import join_stages
    from mgm_exp.model.mining import mine
    from mgm_exp.model.native_mining import mine_native

    projections.zero_grad()
    parts = [projections[name] for name in ("query", "aux", "val")]
    mined = mine_native(low, stages, *parts) if native else mine(low, join_stages(stages), *parts)
    mined.square().mean().backward()
    # Biases of the keys' layers move nothing: their gradient is zero, and rounding noise officially
    gradients = {n: p.grad for n, p in projections.named_parameters() if n not in ("aux.0.bias", "aux.1.bias")}
    return {"mined": mined.detach(), **gradients}


def _apart(ours: Any, peer: Any) -> float:
    return float((ours - peer).abs().max() / peer.abs().max())


def _memory(form: Callable[[], Any]) -> float:
    """Bytes that are alive at most while a form runs, what was made before it left out."""
    from benchmarks.accounting import LiveMemory

    memory = LiveMemory()
    with memory:
        form()
    return float(memory.peak)
