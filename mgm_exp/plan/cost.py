"""What a stage costs in steps and floating-point operations. Estimates, with their formulas.

A multiplication with its addition counts as two operations. n, D, f: tokens, width and MLP width of a tower.
"""

from __future__ import annotations

import math

from mgm_exp.config import AlignConfig, TrainConfig
from mgm_exp.plan.activations import Work
from mgm_exp.plan.architecture import Architecture, Parameters


def steps_of(section: TrainConfig | AlignConfig, rows: int | None) -> int | None:
    """Optimizer steps; None where they depend on a number of rows that is not known."""
    if section.max_steps is not None:
        return section.max_steps
    return None if rows is None else max(1, math.ceil(rows * section.epochs / section.global_batch_size))


def flops_of_sample(sizes: Architecture, parameters: Parameters, work: Work, tokens: float, learnt: float) -> float:
    """Operations for one sample: forward, backward, and forward once more where it is computed again.

    Blocks ``L (2 T w + 4 T^2 h)`` with w weights in their linear layers and h the width of all heads (attention is not
    halved for its mask): forward, gradient of the input, gradient of weights that are trained. Head ``2 n d V`` at n
    learnt positions, computed again in the backward pass where ``train.loss_kernel=torch``. LoRA ``6 T p``.

    Args:
        tokens: T: mean length of a merged sequence.
        learnt: Mean number of learnt tokens.
    """
    again = work.recomputed(sizes.layers) / sizes.layers
    remade = 1 if work.loss_kernel == "torch" else 0
    linear = sum(math.prod(shape) for name, shape in sizes.shapes.items() if is_block_linear(name))
    blocks = 2 * tokens * linear + 4 * tokens**2 * sizes.heads * sizes.head_dim * sizes.layers
    head = 2 * learnt * sizes.hidden * sizes.vocabulary
    vision = flops_of_towers(sizes) if work.encodes_images else 0.0
    mining = flops_of_mining(sizes, work.mines_natively) if work.encodes_images else 0.0
    trains = 1 if work.trains_llm else 0
    reaches = 1 if parameters.trainable else 0
    total = vision + mining * (1 + work.trains_connector * (1 + again))
    total += blocks * (1 + again + reaches + trains) + head * (2 + remade + trains)
    return total + tokens * parameters.lora * (6 + 2 * again)


def is_block_linear(name: str) -> bool:
    """Whether a tensor is one of the matrices of an LLM block."""
    return name.startswith("model.layers.") and name.endswith("_proj.weight")


def flops_of_towers(sizes: Architecture) -> float:
    """One sample through both towers."""
    return flops_of_clip(sizes) + flops_of_convnext(sizes)


def flops_of_clip(sizes: Architecture) -> float:
    """All views of a sample: ``layers (8 n D^2 + 4 n D f + 4 n^2 D)`` each."""
    n, width, mlp = sizes.clip_tokens, sizes.clip_width, sizes.clip_mlp
    return sizes.views * sizes.clip_layers * float(8 * n * width**2 + 4 * n * width * mlp + 4 * n**2 * width)


def flops_of_convnext(sizes: Architecture) -> float:
    """For each stage at side r with width D: ``depth (98 r^2 D + 16 r^2 D^2)`` (7x7 depthwise convolution, two linear
    layers of four times the width) and its 2x2 downsampling."""
    total = 2.0 * sizes.map_side**2 * 48 * sizes.map_widths[0]
    before = 0
    for stage, (wide, depth) in enumerate(zip(sizes.map_widths, sizes.map_depths, strict=True)):
        area = (sizes.map_side >> stage) ** 2
        total += depth * (98 * area * wide + 16 * area * wide**2) + 2 * area * 4 * before * wide
        before = wide
    return total


def flops_of_mining(sizes: Architecture, natively: bool = True) -> float:
    """Queries, keys, values, attention over regions, and the projector.

    Officially keys and values are made of every position of the map: ``4 P D' D``. Natively of every patch: ``4 T D'
    D``, and each position takes part in the scores and in the sum of what was found: ``4 P D'``. Statistics are left
    out.
    """
    width, tokens = sizes.clip_width, sizes.visual_tokens
    if natively:
        rest = 4.0 * (tokens * width + sizes.positions) * sizes.map_width
    else:
        rest = 4.0 * sizes.positions * (sizes.map_width + 1) * width
    return rest + 2 * tokens * (width**2 + width * sizes.hidden + sizes.hidden**2)
