"""What comes and goes in an optimizer step, in bytes: kept activations, and what runs need while they run.

Followed tensor by tensor through the code that runs: Gemma's or Llama's blocks (transformers), PEFT's LoRA layers,
patch info mining and the head of :mod:`mgm_exp.model`. Symbols: N = samples x tokens of the merged sequence, d the
width, f the MLP's width, s the bytes of the compute dtype, t those of the residual stream. Under autocast,
``layer_norm`` computes in fp32 and linear layers take bf16 copies of fp32 inputs (torch.amp's op reference, CUDA).
"""

from __future__ import annotations

from dataclasses import dataclass

from mgm_exp.plan.architecture import Architecture

# As mgm_exp.model.head: elements of the logits that are alive at a time.
LOGITS_AT_A_TIME = 1 << 27
_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class AdapterWork:
    """What a kind of adapter needs beside its parameters and the inputs of its target layers.

    Args:
        kept: Elements for each token and block that are kept for the backward pass.
        whole: Elements of temporaries of a weight's size, in fp32.
        per_block: Elements of weights that each block keeps for its backward pass, in the compute dtype.
        state: Bytes that it remembers between steps.
        packed: Parameters of the base that are held in 4 bits.
    """

    kept: float = 0.0
    whole: float = 0.0
    per_block: float = 0.0
    state: float = 0.0
    packed: int = 0


@dataclass(frozen=True)
class Work:
    """What one process sends through the model in one micro-batch, and how it computes.

    Args:
        stage: ``align``, ``features`` or ``instruct``.
        batch: Samples in one forward pass.
        length: Tokens of the longest merged sequence, image tokens included.
        supervised: Tokens of a sample that are learnt.
        bytes: Of the compute dtype: 2 or 4.
        autocast: Plain PyTorch in half precision: trained parameters are fp32 and are cast as they are used.
        checkpointing: Whether blocks and mining are computed again in the backward pass.
        trains_connector, trains_llm: What is trained beside an adapter.
        targets: Linear layers of a block with an adapter.
        encodes_images: False where visual tokens come from disk.
        devices, zero_stage, offload, overlap, reduce_bucket: How training state is shared.
        accumulation: Micro-batches of one process in a step.
        is_cpu: torch's AdamW takes tensors one by one there.
        is_fused: AdamW is one kernel, without temporaries.
        pixel_bytes: Of one sample's images.
        adapter: What a kind of adapter needs beside inputs of its targets; None: nothing.
        tower, tower_aux: Whether part of the low- and of the high-resolution tower is trained.
        mines_natively: ``model.mining``: from the stages' own maps, not from the joined one.
        blocks: The first so many blocks are computed again; None with ``checkpointing``: all.
        padding_free: No mask says what is padding.
        offloads: What the blocks keep for the backward pass waits in host memory.
        loss_kernel, loss_chunk: How the loss goes over the vocabulary; see :mod:`mgm_exp.model.head`.
    """

    stage: str
    batch: int
    length: int
    supervised: int
    bytes: int
    autocast: bool
    checkpointing: bool
    trains_connector: bool
    trains_llm: bool
    targets: tuple[str, ...] = ()
    rank: int = 0
    has_dropout: bool = False
    encodes_images: bool = True
    is_eager: bool = False
    devices: int = 1
    zero_stage: int = 0
    offload: bool = False
    overlap: bool = False
    reduce_bucket: int = 0
    accumulation: int = 1
    is_cpu: bool = False
    is_fused: bool = False
    pixel_bytes: float = 0.0
    adapter: AdapterWork | None = None
    tower: bool = False
    tower_aux: bool = False
    mines_natively: bool = True
    blocks: int | None = None
    padding_free: bool = False
    offloads: bool = False
    loss_kernel: str = "torch"
    loss_chunk: int | None = None

    def recomputed(self, layers: int) -> int:
        """Of so many blocks, those that are computed again in the backward pass."""
        return 0 if not self.checkpointing else layers if self.blocks is None else min(self.blocks, layers)

    @property
    def tokens(self) -> int:
        """N: positions in a forward pass, padding included."""
        return self.batch * self.length

    @property
    def residual_bytes(self) -> int:
        """t: a trained embedding is fp32 under autocast, and so is what is added to it."""
        return 4 if self.autocast and self.trains_llm else self.bytes


@dataclass(frozen=True)
class Connector:
    """Patch info mining and projector: kept for the backward pass; largest while going forward, and backward."""

    saved: float
    forward: float
    backward: float


@dataclass(frozen=True)
class Layers:
    """The LLM's blocks.

    Args:
        saved: Kept of all blocks at the end of the forward pass.
        inputs: Kept until the first block's backward pass is over.
        copies_forward, copies_backward: bf16 copies of trained weights that autocast made.
        backward: What the last block's backward pass needs beside what is kept (a block's own tensors again, where it
            is computed again).
        backward_first: The same for the first block, its own kept tensors included.
        buffers: Gradients of weights before they are added up.
    """

    saved: float
    inputs: float
    copies_forward: float
    copies_backward: float
    backward: float
    backward_first: float
    buffers: float


@dataclass(frozen=True)
class Head:
    """Language head and loss; see :func:`head`."""

    forward: float
    backward: float
    weight_copy: float
    weight_gradient: float
    embedding_gradient: float
    held: float = 0.0


def towers(sizes: Architecture, work: Work) -> float:
    """Largest while the frozen towers run, without gradient: the ConvNeXt map is joined at the end.

    The stages' own maps, and for mining in the official form the same at the first one's size (made in fp32) and the
    joined map; autocast keeps all of them in fp32, because the norms do.
    """
    area, widths = sizes.map_side**2, sizes.map_widths
    f = 4 if work.autocast else work.bytes
    native = sum(area * width / 4**stage for stage, width in enumerate(widths))
    wide = area * sum(widths[1:])
    joining = f * (native + wide + area * sizes.map_width)
    raising = f * (native + wide) + (4 * area * widths[-1] if f < 4 else 0)
    # A block of the first stage: its input, the convolution's output, the norm's, the MLP's before and after GELU.
    block = area * widths[0] * (26 if work.autocast else 12 * f)
    if work.mines_natively:
        return work.batch * max(f * native, block)
    return work.batch * max(joining, raising, block)


def towers_saved(sizes: Architecture, work: Work) -> float:
    """What the towers keep for their backward pass where part of them is trained: an estimate, not compared.

    CLIP: a layer's norms in fp32, its inputs, queries, keys, values, MLP before and after its activation. ConvNeXt: the
    last block of a stage feeds all later stages, so everything after the first stage's last block is kept: of each
    block its input, the norm's input and output, the MLP's inner values before and after GELU, the scaled output.
    """
    if not work.encodes_images:
        return 0.0
    f = 4 if work.autocast else work.bytes
    total = 0.0
    if work.tower:
        tokens = work.batch * sizes.views * sizes.clip_tokens
        total += sizes.clip_tuned * tokens * (sizes.clip_width * (8 + 7 * work.bytes) + 2 * work.bytes * sizes.clip_mlp)
    if work.tower_aux:
        depths = (1, *sizes.map_depths[1:])
        for stage, (width, depth) in enumerate(zip(sizes.map_widths, depths, strict=True)):
            total += work.batch * depth * (sizes.map_side >> stage) ** 2 * width * (3 * f + 10 * work.bytes)
    return total


def connector(sizes: Architecture, work: Work) -> Connector:
    """Patch info mining, where memory goes: keys and values of all positions of the high-resolution map.

    ``m`` elements of the map, ``k`` of keys. Trained: the regions (read by both norms), the two norms' outputs as the
    linear layers take them, keys and values. With gradient checkpointing only the map itself is kept, and the rest made
    again.
    """
    if not work.encodes_images:
        return Connector(0.0, 0.0, 0.0)
    if work.mines_natively:
        return _native_connector(sizes, work)
    m = float(work.batch * sizes.positions * sizes.map_width)
    k = float(work.batch * sizes.positions * sizes.clip_width)
    tokens = float(work.batch * sizes.visual_tokens)
    small = tokens * (sizes.clip_width * 6 + sizes.hidden * 4)  # patches, query, scores, the projector's own
    s = work.bytes
    high = 4 if work.autocast else s
    if not (work.trains_connector or work.tower or work.tower_aux):
        # high, its copy in s, regions; the norm's fp32 input and output, then the linear layer's input.
        norm = 8 if work.autocast else s
        return Connector(0.0, m * (high + (s if high != s else 0) + s + norm) + 2 * s * k + s * small, 0.0)
    regions = 4 if work.autocast else s
    # Under autocast norms give fp32 and each linear layer takes a copy.
    running = (4 + s) if work.autocast else s
    kept = m * (regions + 2 * s) + 2 * s * k
    forward = m * (high + regions + running) + 2 * s * k + s * small
    # The gradient of a norm's output: as the linear layer gives it, then in the norm's fp32.
    going_back = max(s * m, 4 * m - s * k if work.autocast else 0.0)
    if not work.checkpointing:
        # The keys' input stays; at the end both inputs, keys, values, and the keys once more, scaled.
        forward = max(forward + m * s, m * (high + regions + 2 * s) + 3 * s * k + s * small)
        return Connector(kept + s * small, forward, going_back)
    saved = m * high + tokens * sizes.clip_width * high
    # Crops and the whole image are mined, and made again, one after the other: the crops' map is the larger one.
    share = sizes.map_side**2 / sizes.positions if sizes.positions else 0.0
    return Connector(saved, forward, (kept + going_back) * share + s * small)


def _native_connector(sizes: Architecture, work: Work) -> Connector:
    """Mining from the stages' own maps, in fp32: their pixels below each region, which overlap at its borders.

    ``p`` such pixels' channels are kept for the backward pass where mining is trained, and the bilinear weights of a
    region (``k^2 x m^2`` for each stage and sample). With gradient checkpointing the maps are kept instead.
    """
    s, high = work.bytes, 4 if work.autocast else work.bytes
    views = [(sizes.grid, 1)] + ([(1, sizes.grid)] if sizes.grid > 1 and sizes.has_global else [])
    seen = [_patches(sizes, grid, shrink) for grid, shrink in views]
    tokens = float(work.batch * sizes.visual_tokens)
    # Of every token: patches, query and output, the projector's own; in fp32 the keys' image of the query, what is
    # found, and the same normalised
    small = tokens * (s * (sizes.clip_width * 6 + sizes.hidden * 4) + 4 * 3 * sizes.map_width)
    copies = 4.0 * sizes.clip_width * sizes.map_width if s == 2 and not work.autocast else 0.0
    patches = [4.0 * work.batch * (one.elements + one.weights) for one in seen]
    largest = max(4.0 * work.batch * one.largest for one in seen)
    if not (work.trains_connector or work.tower or work.tower_aux):
        return Connector(0.0, _maps(sizes, work) * high + max(patches) + largest + copies + small, 0.0)
    kept = sum(patches) + copies + small
    forward = _maps(sizes, work) * high + kept + largest
    if not work.checkpointing:
        return Connector(kept, forward, copies)
    saved = _maps(sizes, work) * high + tokens * sizes.clip_width * high
    return Connector(saved, forward, max(patches) + largest + copies + small)


def _maps(sizes: Architecture, work: Work) -> float:
    """Elements of the stages' own maps."""
    area = float(work.batch * sizes.map_side**2)
    return sum(area * width / 4**stage for stage, width in enumerate(sizes.map_widths))


@dataclass(frozen=True)
class _Patches:
    """Of one sample: elements of the native pixels below all regions, of the widest stage's, of bilinear weights."""

    elements: float
    largest: float
    weights: float


def _patches(sizes: Architecture, grid: int, shrink: int) -> _Patches:
    """As ``mgm_exp.model.native_mining`` cuts them: one pixel more on either side below the first stage."""
    n = round(sizes.clip_tokens**0.5) * grid
    side = max(1, sizes.map_side // shrink // max(1, n))  # k
    found, weights = [], 0.0
    for stage, width in enumerate(sizes.map_widths):
        native = min(sizes.map_side >> stage, (side * shrink >> stage) + (2 if stage else 0))
        if native**2 >= side**2:
            native = side
        elif stage:
            weights += float(n * n * side**2 * native**2)
        found.append(float(n * n * native**2 * width))
    return _Patches(sum(found), max(found), weights)


def layers(sizes: Architecture, work: Work) -> Layers:
    """The blocks of the LLM; see :func:`block_saved` for one of them."""
    n, s, t = work.tokens, work.bytes, work.residual_bytes
    d, count = sizes.hidden, sizes.layers
    one = block_saved(sizes, work)
    ends = n * d * (4 + t + t) + (4 * n * d if work.trains_llm else 0)  # final norm, its output, the embeddings
    weights = s * (_linear_weights(sizes) * count) if work.autocast and work.trains_llm else 0.0
    small_copies = s * work.rank * sum(sum(sizes.linear(m)) for m in work.targets) * count if work.autocast else 0.0
    running = _block_backward(sizes, work)
    gradient = (2 + 4 if work.autocast else s) * d * sizes.mlp if work.trains_llm else 0.0
    if work.adapter is not None:
        gradient += 4 * work.adapter.whole
        # One layer's weight is unpacked at a time
        gradient += s * sizes.hidden * sizes.mlp if work.adapter.packed else 0.0
    again = work.recomputed(count)
    kept = count - again
    copies = weights + small_copies
    # Autocast forgets the copies of blocks that are computed again
    copies_backward = copies * kept / count
    if work.offloads:
        return Layers(ends, t * n * d, copies, copies_backward, one + running, one + running, gradient)
    saved = again * t * n * d + kept * one + ends
    last = one + running if again == count else running
    return Layers(saved, t * n * d, copies, copies_backward, last, one + running, gradient)


def block_saved(sizes: Architecture, work: Work) -> float:
    """What one block keeps for its backward pass.

    Norms ``4 N d`` each (their fp32 input; the output too where they are trained), inputs of trained or adapted linear
    layers, queries, keys, values and output of the attention, and ``3 s N f`` of the gated MLP (the gate before and
    after GELU, the other branch), with its product where ``down_proj`` needs it.
    """
    n, s, d, f = work.tokens, work.bytes, sizes.hidden, sizes.mlp
    query, key = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    norms = 2 * n * d * (8 if work.trains_llm else 4)
    # Keys and values are repeated for each head where a mask says what is padding.
    repeated = query if work.batch > 1 and not work.is_eager and not work.padding_free else key
    attention = s * n * (query + 2 * repeated + query) + 4 * n * sizes.heads
    if work.is_eager:
        attention += (4 + s) * work.batch * sizes.heads * work.length**2 + s * n * 2 * (query - key)
    mlp = 3 * s * n * f
    own = s * (n * work.adapter.kept + work.adapter.per_block) if work.adapter is not None else 0.0
    return norms + attention + mlp + own + sum(_input_saved(sizes, work).values())


def _input_saved(sizes: Architecture, work: Work) -> dict[str, float]:
    """Inputs of the seven linear layers as they are kept; those of one tensor are counted with its first reader."""
    n, s = work.tokens, work.bytes
    width = {module: sizes.linear(module)[1] for module in (*_QKV, "o_proj", *_MLP)}
    found: dict[str, float] = {}
    if work.trains_llm:
        for module in width:
            # The attention's output is kept already; fp32 norms give each layer a copy of its own.
            is_shared = module == "o_proj" or (not work.autocast and module in ("k_proj", "v_proj", "up_proj"))
            found[module] = 0.0 if is_shared else float(s * n * width[module])
        return found
    for module in work.targets:
        rank = s * n * work.rank
        if work.autocast or work.has_dropout:
            # PEFT casts the input to the adapter's fp32, autocast casts it back: a copy for each layer, and a mask.
            found[module] = n * width[module] * (s + (1 if work.has_dropout else 0)) + rank
        else:
            is_shared = module == "o_proj" or any(other in found for other in _same_input(module))
            found[module] = (0.0 if is_shared else s * n * width[module]) + rank
    return found


_QKV = ("q_proj", "k_proj", "v_proj")


def _same_input(module: str) -> tuple[str, ...]:
    if module in _QKV:
        return _QKV
    return ("gate_proj", "up_proj") if module in ("gate_proj", "up_proj") else ()


def _block_backward(sizes: Architecture, work: Work) -> float:
    """What runs while the MLP of a block goes backward, which needs most: gradients as wide as the MLP."""
    n, s, f = work.tokens, work.bytes, sizes.mlp
    if "down_proj" in work.targets and work.autocast:
        # From the base layer, and from the adapter: in fp32 between two casts, once more where there is dropout.
        wide = (6 + 2 * work.has_dropout) * n * f
    else:
        # Of the product and its two factors; where the product is kept it is let go meanwhile.
        wide = s * n * f * (2 if work.trains_llm or "down_proj" in work.targets else 3)
    return wide + work.residual_bytes * n * sizes.hidden * 2


def _linear_weights(sizes: Architecture) -> int:
    return sum(rows * columns for rows, columns in (sizes.linear(module) for module in (*_QKV, "o_proj", *_MLP)))


def head(sizes: Architecture, work: Work) -> Head:
    """The head at supervised positions only, some of them at a time; nothing of the logits is kept.

    Forward: logits in the compute dtype, in fp32, and their logarithms; backward: probabilities and their gradient.
    A trained (tied) embedding has its gradient summed in fp32, ``4 V d``, and once more while it is made. Kernels that
    make gradients with the loss hold them (``held``) until the backward pass, which multiplies them.
    """
    rows, each = logits_at_a_time(sizes, work)
    s, embedding = work.bytes, float(sizes.vocabulary * sizes.hidden)
    logits = float(rows * sizes.vocabulary)
    if work.loss_kernel != "torch":
        return _early_head(sizes, work, logits * each)
    copy = embedding * s if work.autocast and work.trains_llm else 0.0
    logarithms = logits * each
    if not work.trains_llm:
        return Head(logarithms, logarithms, copy, 0.0, 0.0)
    # While the product for the weight's gradient is made, only the logits' gradient is left of the logits.
    gradient = copy + 4 * embedding + max(0.0, s * embedding - logits * 8)
    return Head(logarithms, logarithms, copy, gradient, embedding * (4 if work.autocast else s))


def logits_at_a_time(sizes: Architecture, work: Work) -> tuple[int, int]:
    """Positions whose logits are alive together, and bytes of each of their logits.

    Liger's chunks are as large as the hidden states, rounded up to a power of two of rows, and its logits become their
    own gradient in place.
    """
    all_rows = work.batch * work.supervised
    if work.loss_kernel == "liger":
        parts = -(-sizes.vocabulary // sizes.hidden)
        return min(1 << (max(1, -(-all_rows // parts)) - 1).bit_length(), all_rows), work.bytes
    each = 8 + (work.bytes if work.bytes == 2 else 0)
    if sizes.is_head_whole and work.loss_kernel == "torch" and work.loss_chunk is None:
        return all_rows, each
    return min(work.loss_chunk or max(1, LOGITS_AT_A_TIME // sizes.vocabulary), all_rows), each


def _early_head(sizes: Architecture, work: Work, logits: float) -> Head:
    """``fused`` and ``liger``: the gradient of the hidden states, and of a trained weight, from the loss on.

    Args:
        logits: Bytes of those that are alive together.
    """
    s, embedding = work.bytes, float(sizes.vocabulary * sizes.hidden)
    copy = embedding * s if work.autocast and work.trains_llm else 0.0
    hidden = float(work.batch * work.supervised * sizes.hidden * s)
    if not work.trains_llm:
        return Head(logits, 0.0, copy, 2 * hidden, 0.0, hidden)
    # Beside the sum a chunk's part of it, in the forward pass; its multiple, in the backward pass
    forward, backward = copy + s * embedding, 4 * embedding
    gradient = embedding * (4 if work.autocast else s)
    return Head(logits, 0.0, forward, backward, gradient, hidden + 4 * embedding)
