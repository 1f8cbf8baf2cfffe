"""Peak memory of one process of a stage, from sizes alone.

What is held all the time (weights, gradients, optimizer state) is exact arithmetic. What comes and goes is followed
through the moments of an optimizer step at which it can be largest; each moment is a sum of tensors that are alive
together, and the largest sum is the peak. Counted is what PyTorch allocates for tensors, as
``torch.cuda.max_memory_allocated`` reports it: not CUDA's own context, workspaces of kernels, or what the allocator
keeps in reserve; :func:`mgm_exp.plan.cards.verdict` leaves room for those.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mgm_exp.plan.activations import AdapterWork, Work, connector, head, layers, towers, towers_saved
from mgm_exp.plan.architecture import Architecture, Parameters

GIB = 1024**3
COMPONENTS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")
# AdamW keeps two moments of 4 bytes for each trained parameter (Loshchilov & Hutter, arXiv 1711.05101).
_ADAM_BYTES = 8
_MASTER_BYTES = 4
# Of a weight in NF4 with double quantisation: 4.127 bits (Dettmers et al., arXiv 2305.14314, section 3).
_PACKED_BYTES = 4.127 / 8


@dataclass(frozen=True)
class Moment:
    """What is alive together at one moment, in bytes.

    Args:
        name: The moment.
        weights: Parameters in the dtype they are computed with (fp32 where plain PyTorch trains them).
        gradients: As they are accumulated.
        optimizer: Moments of AdamW, and fp32 masters where DeepSpeed keeps them.
        activations: Kept for the backward pass, and what a layer, the towers or mining need while they run.
        logits: Of the language head, as many positions at a time as it takes.
        buffers: Communication buckets, copies of weights in another dtype, temporaries of the optimizer.
    """

    name: str
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float

    @property
    def total(self) -> float:
        return sum(getattr(self, name) for name in COMPONENTS)


@dataclass(frozen=True)
class Held:
    """What is held all the time, in bytes; see :func:`held`."""

    weights: float
    gradients: float
    optimizer: float
    buffers: float


def held(parameters: Parameters, sizes: Architecture, work: Work) -> Held:
    """Weights, gradients and optimizer state of one process.

    Plain PyTorch, t trained and f frozen parameters, s bytes of the compute dtype: ``4 t + s f`` weights, ``4 t``
    gradients, ``8 t`` optimizer: 16 bytes a trained parameter. ZeRO over D processes (Rajbhandari et al.,
    arXiv 1910.02054, section 5, with K = 12): stage 2 ``s (t + f)`` weights, ``s t / D`` gradients, ``12 t / D``
    optimizer; stage 3 also ``s (t + f) / D`` weights, and whole what is computed with. ``offload_optimizer=cpu`` moves
    masters, moments and gradients to the host.
    """
    trained, frozen = parameters.trainable, parameters.total - parameters.trainable
    if not work.zero_stage:
        own = work.adapter or AdapterWork()
        packed = own.packed * (work.bytes - _PACKED_BYTES)
        # fp32 where trained, whatever the precision: autocast makes the copies that are computed with.
        weights = 4 * trained + work.bytes * frozen - packed
        return Held(weights, 4.0 * trained, _ADAM_BYTES * trained + own.state, 0.0)
    share = 1 / work.devices
    weights, buckets = float(work.bytes * (trained + frozen)), 0.0
    if work.zero_stage == 3:
        whole = work.bytes * (_largest_block(sizes) + work.reduce_bucket)
        weights, buckets = weights * share, float(whole)
    buckets += work.bytes * work.reduce_bucket * (2 if work.overlap else 1)
    if work.offload:
        return Held(weights, 0.0, 0.0, buckets)
    states = (_ADAM_BYTES + (_MASTER_BYTES if work.bytes == 2 else 0)) * trained * share
    return Held(weights, work.bytes * trained * share, states, buckets)


def _largest_block(sizes: Architecture) -> int:
    """Parameters that stage 3 gathers at once: the embedding (which is the head), or one block of the LLM."""
    embedding = sizes.vocabulary * sizes.hidden
    block = sum(math.prod(shape) for name, shape in sizes.shapes.items() if name.startswith("model.layers.0."))
    return max(embedding, block)


def moments(sizes: Architecture, parameters: Parameters, work: Work) -> list[Moment]:
    """The moments of an optimizer step at which memory can be largest, in their order."""
    has, mine = held(parameters, sizes, work), connector(sizes, work)
    if work.stage == "features":
        return [Moment("encoding images", has.weights, 0.0, 0.0, max(towers(sizes, work), mine.forward), 0.0, 0.0)]
    # The first micro-batch of a step finds no gradients; DistributedDataParallel keeps its buckets.
    keeps_buckets = work.devices > 1 and not work.zero_stage
    before = has.gradients if work.accumulation > 1 or keeps_buckets else 0.0
    seen = towers_saved(sizes, work)
    llm, words = layers(sizes, work), head(sizes, work)
    inputs = work.batch * sizes.views * work.pixel_bytes if work.encodes_images else 0.0

    def moment(name: str, gradients: float, activations: float, logits: float = 0.0, buffers: float = 0.0) -> Moment:
        return Moment(name, has.weights, gradients, has.optimizer, activations + inputs, logits, has.buffers + buffers)

    found = []
    if work.encodes_images:
        found.append(moment("encoding images", before, max(towers(sizes, work), mine.forward)))
    saved = mine.saved + llm.saved + seen
    after_head = max(before, words.embedding_gradient)
    found += [
        moment("loss", before, saved + llm.copies_forward, words.forward, words.weight_copy + words.held),
        moment(
            "backward of the head",
            before,
            saved + llm.copies_backward,
            words.backward,
            words.weight_gradient + words.held,
        ),
        moment("backward of the last layer", after_head, saved + llm.copies_backward + llm.backward, 0.0, llm.buffers),
        moment("backward of the first layer", has.gradients, mine.saved + seen + llm.inputs + llm.backward_first),
    ]
    if mine.backward:
        found.append(moment("backward of mining", has.gradients, mine.saved + seen + llm.inputs + mine.backward))
    if work.trains_llm:
        found.append(moment("gradient of the embedding", has.gradients, 0.0, 0.0, words.embedding_gradient))
    found.append(Moment("optimizer step", has.weights, has.gradients, has.optimizer, 0.0, 0.0, _step(parameters, work)))
    return found


def _step(parameters: Parameters, work: Work) -> float:
    """AdamW's step in torch: one kernel without temporaries, or (``foreach``: ZeRO, fp16, AdaLoRA) all roots of the
    second moments at once, 4 bytes a parameter."""
    if work.offload or work.is_cpu or work.is_fused:
        return 0.0
    group = max(parameters.lora + parameters.trained_llm, parameters.trained_connector)
    share = 1 / work.devices if work.zero_stage else 1.0
    # ZeRO flattens the gradients of its part in fp32 before it steps.
    return (4.0 * group + (_MASTER_BYTES * parameters.trainable if work.zero_stage else 0.0)) * share


def peak(found: list[Moment]) -> Moment:
    """The moment that needs most."""
    return max(found, key=lambda moment: moment.total)
