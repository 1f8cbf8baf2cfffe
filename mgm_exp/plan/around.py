"""Memory before, between and after the steps of a stage: loading the model, saving, going on, writing the result.

What the code of :mod:`mgm_exp.train` does, tensor by tensor; the largest tensor is the embedding. With ZeRO the model
lies whole on every process until DeepSpeed has shared it out, and its result is written from whole tensors.
"""

from __future__ import annotations

import math

from mgm_exp.plan.activations import Work
from mgm_exp.plan.architecture import Architecture, Parameters
from mgm_exp.plan.memory import Moment, held

LOADING, SAVING, RESUMING, WRITING = (
    "loading the model",
    "saving a checkpoint",
    "going on from a checkpoint",
    "writing the result",
)
_FP32 = 4


def around(sizes: Architecture, parameters: Parameters, work: Work) -> list[Moment]:
    """The moments around a stage's steps, of one process.

    - loading: every weight in the compute dtype, whole, also where it is shared out or packed into 4 bits afterwards;
      then what is trained becomes fp32, one tensor after the other.
    - saving: plain PyTorch copies to the host; ZeRO puts weight and both moments of one tensor together in fp32.
    - going on: what the optimizer keeps is put on the device; ZeRO one tensor at a time.
    - writing: ZeRO-3 gathers all that is written.
    """
    has = held(parameters, sizes, work)
    largest = float(_largest(sizes, parameters, work))
    whole = float(work.bytes * parameters.total)
    if work.stage == "features":
        return [Moment(LOADING, whole, 0.0, 0.0, 0.0, 0.0, 0.0)]

    def moment(name: str, buffers: float, weights: float = has.weights, optimizer: float = has.optimizer) -> Moment:
        return Moment(name, weights, 0.0, optimizer, 0.0, 0.0, buffers)

    if not work.zero_stage:
        changed = work.bytes * largest if work.autocast else 0.0
        return [
            moment(LOADING, changed, max(whole, has.weights), 0.0),
            moment(SAVING, 0.0),
            moment(RESUMING, 0.0),
        ]
    written = work.bytes * (parameters.total if work.trains_llm else parameters.trainable)
    buckets = has.buffers
    return [
        moment(LOADING, 0.0, whole, 0.0),
        moment(SAVING, buckets + 3 * _FP32 * largest),
        moment(RESUMING, buckets + 2 * _FP32 * largest),
        moment(WRITING, buckets + (written if work.zero_stage == 3 else 0.0)),
    ]


def _largest(sizes: Architecture, parameters: Parameters, work: Work) -> int:
    """Elements of the largest tensor that is trained."""
    if work.trains_llm:
        return max((math.prod(shape) for name, shape in sizes.shapes.items()), default=0)
    connector = [
        math.prod(shape)
        for name, shape in sizes.shapes.items()
        if work.trains_connector and name.startswith(("model.mm_projector.", "model.vlm_uni_"))
    ]
    adapter = [work.rank * max(sizes.linear(module)) for module in work.targets] if work.rank else []
    return max([*connector, *adapter, 0])
