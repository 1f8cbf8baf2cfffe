"""Signs of life of a model in training: does it still see, does it still learn? Looked at every ``dead_after`` updates.

A dead vision path costs nothing to the eye: the loss falls, because the LLM guesses from the question. So the visual
tokens of different images are compared, the gradient of the connector is watched, mining's broken scores are counted,
and LoRA's B must have left zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mgm_exp.train.ranks import Ranks

if TYPE_CHECKING:
    from mgm_exp.train.engine import Engine

# Visual tokens of different images that are closer than this share of their size are the same.
SAME = 1e-6


class Vitals:
    """Looks at one stage's model.

    Args:
        model: The MGM.
        engine: Around it.
        ranks: This process.
        every: Updates between two looks; None: never.
    """

    def __init__(self, model: nn.Module, engine: Engine, ranks: Ranks, every: int | None) -> None:
        self._engine, self._ranks, self._every = engine, ranks, every
        self._body: Any = getattr(model, "model", None)
        self._spread: list[Tensor] = []
        self._zero_b = [name for name in engine.trainable if "lora_B" in name]
        self.mining: Tensor | None = None
        if self._body is not None and hasattr(self._body, "mining_faults"):
            self.mining = torch.zeros(2, dtype=torch.int64, device=ranks.device)
            self._body.mining_faults = self.mining

    def is_due(self, updates: int) -> bool:
        """Whether the step after so many updates is looked at."""
        return self._every is not None and updates > 0 and updates % self._every == 0

    @contextmanager
    def watching(self, micro_batches: list[Any]) -> Iterator[None]:
        """Measures how much visual tokens differ between images while it is open: those that the projector makes, or
        the cached ones of the batches."""
        cached = [tokens for micro in micro_batches if (tokens := _cached(micro.batch)) is not None]
        self._spread = [_spread(tokens) for tokens in cached]
        projector = getattr(self._body, "mm_projector", None)
        if self._spread or projector is None:
            yield
            return
        hook = projector.register_forward_hook(lambda module, given, tokens: self._spread.append(_spread(tokens)))
        try:
            yield
        finally:
            hook.remove()

    def faults(self, has_images: bool, connector_norm: float | None) -> list[tuple[str, str]]:
        """What is dead after the step that was watched, as ``(event, in words)``; called by all processes.

        Args:
            has_images: Whether the step had any.
            connector_norm: Norm of the connector's gradient in it; None: not known, or it is frozen.
        """
        widest = max((float(spread) for spread in self._spread), default=-1.0)
        # Sharded under ZeRO or not, master() is whole on every process; the tokens are each process's own
        zero_b = [name for name in self._zero_b if not self._engine.master(name).any()]
        self._zero_b, n_before = zero_b, len(self._zero_b)
        widest = max(row[0] for row in self._ranks.gather([widest]))
        found = []
        if has_images and 0 <= widest < SAME:
            found.append(("vision_dead", f"the visual tokens of all images are the same (they differ by {widest:.1g})"))
        if has_images and connector_norm == 0:
            found.append(("vision_dead", "the gradient of projector and mining is zero"))
        if zero_b:
            told = f"{len(zero_b)} of {n_before} LoRA updates are still zero, the first one {zero_b[0]}"
            found.append(("lora_b_zero", told))
        return found


def _cached(batch: Mapping[str, Any]) -> Tensor | None:
    """Visual tokens that no projector makes in this step, where they are those of the whole batch."""
    seen = batch.get("seen") or {}
    tokens = batch.get("visual_tokens") if "order" in seen or "tokens" not in seen else seen["tokens"]
    return tokens if isinstance(tokens, Tensor) else None


def _spread(tokens: Tensor) -> Tensor:
    """Largest standard deviation of an element over images and places, in proportion to the tokens' size.

    Args:
        tokens: (B, N, D); rows of zeros belong to samples without an image.
    """
    flat = tokens.detach().float().flatten(0, -2)
    flat = flat[flat.any(-1)]
    if len(flat) < 2:
        return torch.full((), -1.0, device=tokens.device)
    return flat.std(0).max() / flat.abs().mean().clamp(min=1e-30)


# -- gradients of each layer -----------------------------------------------------------------------------------------


def gradient_statistics(engine: Engine) -> dict[str, dict[str, float | None]]:
    """Norm, largest element and share of zeros of the gradient of each layer group; called by all processes between
    the last backward pass and the update."""
    sums: dict[str, Tensor] = {}
    for name in engine.trainable:
        gradient = engine.gradient(name)
        if gradient is None:
            continue
        values = gradient.float()
        facts = torch.stack(
            [values.square().sum(), values.abs().max(), (values == 0).sum().float(), torch.ones_like(values).sum()]
        )
        group = layer_group(name)
        before = sums.get(group)
        if before is not None:
            facts = torch.stack([before[0] + facts[0], torch.maximum(before[1], facts[1]), *(before[2:] + facts[2:])])
        sums[group] = facts
    return {group: _facts(facts.tolist()) for group, facts in sums.items()}


def _facts(values: list[float]) -> dict[str, float | None]:
    square, largest, zeros, count = values
    norm = square**0.5
    return {
        "norm": norm if norm < float("inf") else None,
        "max": largest if largest < float("inf") else None,
        "zero_share": zeros / count,
    }


def layer_group(name: str) -> str:
    """``layers.7``, ``layers.7.lora_A``, ``mm_projector``, ``embed_tokens``, ... of a parameter's official name."""
    parts = name.removeprefix("base_model.model.").removeprefix("model.").split(".")
    group = ".".join(parts[:2]) if parts[0] == "layers" else parts[0]
    kind = next((f".{part}" for part in parts if part in ("lora_A", "lora_B")), "")
    return group + kind
