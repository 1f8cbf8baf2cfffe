"""PyTorch's own accounting of memory: every tensor that is alive, while a model of any size runs without its weights.

The model's code runs on fake tensors (shapes and dtypes, no values), so MGM-2B takes seconds on a CPU. Every storage
that an operation makes is counted until Python and autograd let go of it, as an allocator would, rounded to nothing and
without workspaces of kernels. Attention runs as the fused CPU kernel, which keeps what flash attention keeps; norms and
softmax follow the autocast rules of CUDA, which differ from the CPU's.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GIB = 1024**3


class LiveMemory(TorchDispatchMode):
    """Bytes of all storages that are alive, and the most there were since :meth:`mark`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def hold(self, tensor: Tensor) -> None:
        """Counts a tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        if id(storage) in self._sizes:
            return
        self._sizes[id(storage)] = size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, id(storage))

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.hold(leaf)
        return out

    def mark(self) -> int:
        """The most that was alive since the last mark."""
        most, self.peak = self.peak, self.live
        return most


@contextmanager
def rules_of_cuda() -> Iterator[None]:
    """``layer_norm`` and ``softmax`` in fp32 under autocast, and a mask of one byte for dropout, as on a GPU."""
    norm, softmax, dropout = F.layer_norm, Tensor.softmax, F.dropout

    def wide_norm(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return norm(x, shape, weight, bias, eps)
        with torch.autocast("cpu", enabled=False):
            return norm(x.float(), shape, weight.float(), bias.float(), eps)

    def wide_softmax(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return softmax(x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs)

    def masked(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(x, p, training)[0] if training and p else x

    F.layer_norm, Tensor.softmax, F.dropout = wide_norm, wide_softmax, masked  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        F.layer_norm, Tensor.softmax, F.dropout = norm, softmax, dropout  # type: ignore[method-assign]


def fake_step(config: Any, adapter: Any, work: Any, *, seed: int = 0, detail: bool = False) -> dict[str, float]:
    """Bytes at the moments of one micro-batch of a stage, as PyTorch counts them.

    Args:
        config: ``MGMConfig``.
        adapter: ``AdapterConfig`` or a mapping.
        work: ``mgm_exp.plan.Work``: what is trained, batch, length, precision; one process without ZeRO.

    Returns:
        Moment -> the most bytes that were alive in it, weights included.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    memory = LiveMemory()
    found: dict[str, float] = {}
    model = _model(config, adapter, work)
    with FakeTensorMode(allow_non_fake_inputs=True), rules_of_cuda():
        _give_tensors(model, work)
        half = torch.bfloat16 if work.bytes == 2 else torch.float32
        with memory:
            for parameter in model.parameters():
                memory.hold(parameter)
            _watch(model, memory, found)
            found["weights"] = memory.mark()
            autocast = torch.autocast("cpu", torch.bfloat16) if work.autocast else nullcontext()
            with autocast:
                loss = _loss(model, config, work, half, memory, found)
            found["loss"] = memory.mark()
            if work.stage == "features":
                return found
            loss.backward()
            end = memory.mark()
            # Under a dispatch mode autograd adds the two gradients of a tied embedding out of place; without one it
            # adds in place, so one embedding less is alive.
            twice = model.lm_head.weight.nbytes if work.trains_llm and config.tie_word_embeddings else 0
            found["backward, the end"] = end - twice
    return found


def _model(config: Any, adapter: Any, work: Any) -> Any:
    """The model with its adapter and what is trained of it set, without memory."""
    from mgm_exp.model import apply_adapter, meta_model, set_trainable

    config._attn_implementation = "sdpa"
    model = meta_model(config)
    model.model.mines_natively = work.mines_natively
    model.lm_head.kernel, model.lm_head.chunk = work.loss_kernel, work.loss_chunk
    if work.checkpointing:
        model.enable_gradient_checkpointing(True if work.blocks is None else work.blocks)
    if work.stage == "features":
        model.requires_grad_(False)
    else:
        if work.stage == "instruct":
            apply_adapter(model, adapter, 0)
        set_trainable(model, work.stage, adapter, not work.trains_connector)
        model.train()
    return model


def _give_tensors(model: Any, work: Any) -> None:
    """Fake tensors for all that the model holds, in the dtypes of training."""
    half = torch.bfloat16 if work.bytes == 2 else torch.float32
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                # Plain PyTorch trains in fp32, DeepSpeed in the compute dtype with masters of its own.
                dtype = torch.float32 if parameter.requires_grad and work.autocast else half
                fake = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), parameter.requires_grad)
                module._parameters[name] = made.setdefault(id(parameter), fake)  # a tied head stays tied
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _loss(model: Any, config: Any, work: Any, half: torch.dtype, memory: LiveMemory, found: dict[str, float]) -> Any:
    """``model.loss`` with sizes in place of ids: what depends on values cannot run without them."""
    n = config.visual_tokens_per_image
    side, views = (
        config.vision_config["image_size"],
        n // (config.vision_config["image_size"] // config.vision_config["patch_size"]) ** 2,
    )
    text_length = work.length - n
    sources = []
    if work.encodes_images:
        shape = (work.batch, 3, side, side) if views == 1 else (work.batch, views, 3, side, side)
        images, high = torch.empty(shape), torch.empty(work.batch, 3, config.image_size_aux, config.image_size_aux)
        if not work.autocast:
            images, high = images.to(half), high.to(half)
        grad = torch.no_grad() if work.stage == "features" else nullcontext()
        with grad:
            visual = model.model.encode_images(images, high)
        found["encoding images"] = memory.mark()
        if work.stage == "features":
            return visual
    else:
        visual = torch.empty(work.batch, n, config.hidden_size, dtype=half)
    text = model.model.embed_tokens(torch.zeros(work.batch, text_length, dtype=torch.long)).flatten(0, 1)
    visual = visual.to(text).flatten(0, 1)
    if config.embed_scale != 1.0:
        visual = visual * model.model.embed_tokens.embed_scale.to(text.dtype)
    sources = [text, visual]
    sources.append(text.new_zeros(1, text.shape[-1]))
    embeds = torch.cat(sources)[torch.zeros(work.batch, work.length, dtype=torch.long)]
    del sources, text, visual
    mask = None
    if work.batch > 1:
        mask = torch.zeros(work.batch, 1, work.length, work.length, dtype=torch.bool)
    hidden = model.model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
    found["layers"] = memory.mark()
    n_learnt = work.batch * work.supervised
    kept = torch.zeros(n_learnt, dtype=torch.long)
    return model.lm_head(hidden[:, :-1].flatten(0, 1)[kept], torch.zeros(n_learnt, dtype=torch.long)) / n_learnt


def _watch(model: Any, memory: LiveMemory, found: dict[str, float]) -> None:
    """Marks where the backward pass leaves the head, the last block, and the first one."""
    layers: nn.ModuleList = model.model.layers

    def leave(name: str) -> Any:
        def hook(*_: Any) -> None:
            found[name] = memory.mark()

        return hook

    model.lm_head.register_full_backward_hook(leave("backward of the head"))
    layers[-1].register_full_backward_hook(leave("backward of the last layer"))
    layers[0].register_full_backward_hook(leave("backward of the other layers"))


def fake_answers(config: Any, batch: int, length: int, tokens: int, itemsize: int, images: int) -> dict[str, float]:
    """Bytes at the moments of answering a batch, as PyTorch counts them.

    Args:
        config: ``MGMConfig``.
        batch, length: Prompts, padded; tokens of one with its image's.
        tokens: That are written.
        itemsize: Bytes of the dtype.
        images: That are encoded at a time.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import DynamicCache

    from mgm_exp.model import meta_model

    config._attn_implementation = "sdpa"
    model = meta_model(config)
    model.requires_grad_(False)
    model.eval()
    memory = LiveMemory()
    found: dict[str, float] = {}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        _give_tensors(model, _Plain(itemsize))
        half = torch.bfloat16 if itemsize == 2 else torch.float32
        n, width = config.visual_tokens_per_image, config.hidden_size
        with memory:
            for parameter in model.parameters():
                memory.hold(parameter)
            seen = torch.empty(batch, n, width, dtype=half)
            memory.mark()
            side, side_aux = config.vision_config["image_size"], config.image_size_aux
            views = n // (side // config.vision_config["patch_size"]) ** 2
            shape = (images, 3, side, side) if views == 1 else (images, views, 3, side, side)
            low = torch.empty(shape, dtype=half)
            model.model.encode_images(low, torch.empty(images, 3, side_aux, side_aux, dtype=half))
            found["encoding images"] = memory.mark()
            del low
            embeds = torch.empty(batch, length, width, dtype=half)
            cache = DynamicCache(config=config)
            logits = _answer(model, cache, length, length, inputs_embeds=embeds)
            found["reading the prompts"] = memory.mark()
            for k in range(tokens):
                logits = _answer(model, cache, 1, length + k + 1, input_ids=logits.argmax(-1)[:, None])
            found["writing the answers"] = memory.mark()
            del seen
    return found


class _Plain:
    """How tensors are given to a model that is not trained."""

    autocast = False

    def __init__(self, itemsize: int) -> None:
        self.bytes = itemsize


def _answer(model: Any, cache: Any, new: int, whole: int, **inputs: Tensor) -> Tensor:
    """(B, vocabulary): logits of the last position, as :mod:`mgm_exp.evaluate.greedy` asks for them."""
    batch = len(next(iter(inputs.values())))
    mask = torch.zeros(batch, 1, new, whole, dtype=torch.bool) if batch > 1 else None
    places = torch.zeros(batch, new, dtype=torch.long)
    out = model(
        attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True, logits_to_keep=1, **inputs
    )
    last: Tensor = out.logits[:, -1]
    return last


def fake_captions(config: Any, batch: int, prompt: int, tokens: int) -> dict[str, float]:
    """Bytes at the moments of a BLIP-2 model that captions a batch in bf16, as PyTorch counts them.

    Args:
        config: ``Blip2Config``.
        batch, prompt, tokens: Images, tokens of the prompt with the image's, tokens that are written.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import Blip2ForConditionalGeneration, DynamicCache
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        model = Blip2ForConditionalGeneration(config)
        model.tie_weights()
    model.eval()
    memory = LiveMemory()
    found: dict[str, float] = {}
    size, width = config.vision_config.image_size, config.text_config.hidden_size
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        _give_tensors(model, _Plain(2))
        with memory:
            for parameter in model.parameters():
                memory.hold(parameter)
            memory.mark()
            seen = model.get_image_features(torch.empty(batch, 3, size, size, dtype=torch.bfloat16)).pooler_output
            found["looking at images"] = memory.mark()
            cache = DynamicCache()
            inputs: dict[str, Tensor] = {"inputs_embeds": torch.empty(batch, prompt, width, dtype=torch.bfloat16)}
            for k in range(tokens):
                new = next(iter(inputs.values())).shape[1]
                out = model.language_model(
                    attention_mask=torch.ones(batch, prompt + k, dtype=torch.long),
                    position_ids=torch.zeros(batch, new, dtype=torch.long),
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                    **inputs,
                )
                logits = out.logits[:, -1].float()
                inputs = {"input_ids": logits.argmax(-1)[:, None]}
                del out
                found["reading the prompts" if k == 0 else "writing the captions"] = memory.mark()
            del seen
    return found
