"""Which attention kernel runs: the one asked for where it can run, never another one in silence."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mgm_exp.errors import ConfigError, MissingDependencyError

CHOICES = ("auto", "eager", "sdpa", "flash_attention_2")


@dataclass(frozen=True)
class AttentionChoice:
    """`name` is what runs in the LLM and in CLIP, `reason` why (recorded with the run)."""

    name: str
    reason: str


def choose_attention(asked: str | None, device: torch.device, dtype: torch.dtype) -> AttentionChoice:
    """Resolves `auto` (FlashAttention where it can run, else SDPA) and checks an explicit choice.

    Raises:
        ConfigError: an unknown name.
        MissingDependencyError: `flash_attention_2` where it cannot run.
    """
    asked = asked or "auto"
    if asked not in CHOICES:
        raise ConfigError(f"attn_implementation {asked!r} is not known: allowed are {', '.join(CHOICES)}.")
    if asked in ("eager", "sdpa"):
        return AttentionChoice(asked, "asked for")
    obstacle = flash_obstacle(device, dtype)
    if asked == "flash_attention_2":
        if obstacle:
            raise MissingDependencyError(
                f"attn_implementation=flash_attention_2 cannot run here: {obstacle}.",
                advice="Use attn_implementation=auto (or sdpa, eager); for FlashAttention install the extra 'cuda'.",
            )
        return AttentionChoice(asked, "asked for")
    if obstacle:
        return AttentionChoice("sdpa", f"auto: FlashAttention 2 cannot run here: {obstacle}")
    return AttentionChoice("flash_attention_2", "auto: FlashAttention 2 can run")


def flash_obstacle(device: torch.device, dtype: torch.dtype) -> str:
    """What keeps FlashAttention 2 from running, in words; empty if nothing does."""
    from transformers.utils import is_flash_attn_2_available

    if device.type != "cuda":
        return f"it needs a CUDA device and this model is on {device.type!r}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it needs float16 or bfloat16 weights and these are {str(dtype).removeprefix('torch.')}"
    if not is_flash_attn_2_available():
        return "the package flash-attn is not installed"
    return ""
