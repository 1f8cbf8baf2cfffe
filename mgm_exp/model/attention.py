"""Which attention kernel runs: the one asked for where it can run, never another one in silence."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mgm_exp.errors import ConfigError, MissingDependencyError

FLASH = ("flash_attention_3", "flash_attention_2")
CHOICES = ("auto", "eager", "sdpa", *reversed(FLASH))
# FlashAttention 3 is written for Hopper: compute capability 9.
_HOPPER = 9


@dataclass(frozen=True)
class AttentionChoice:
    """`name` is what runs in the LLM and in CLIP, `reason` why (recorded with the run)."""

    name: str
    reason: str


def choose_attention(asked: str | None, device: torch.device, dtype: torch.dtype) -> AttentionChoice:
    """Resolves `auto` (FlashAttention where it can run, 3 before 2, else SDPA) and checks an explicit choice.

    Raises:
        ConfigError: an unknown name.
        MissingDependencyError: a FlashAttention where it cannot run.
    """
    asked = asked or "auto"
    if asked not in CHOICES:
        raise ConfigError(f"attn_implementation {asked!r} is not known: allowed are {', '.join(CHOICES)}.")
    if asked in ("eager", "sdpa"):
        return AttentionChoice(asked, "asked for")
    if asked in FLASH:
        if obstacle := flash_obstacle(device, dtype, asked):
            raise MissingDependencyError(
                f"attn_implementation={asked} cannot run here: {obstacle}.",
                advice="Use attn_implementation=auto (or sdpa, eager); for FlashAttention 2 install the extra 'cuda'.",
            )
        return AttentionChoice(asked, "asked for")
    obstacle = ""
    for name in FLASH:
        obstacle = flash_obstacle(device, dtype, name)
        if not obstacle:
            return AttentionChoice(name, f"auto: FlashAttention {name[-1]} can run")
    return AttentionChoice("sdpa", f"auto: FlashAttention 2 cannot run here: {obstacle}")


def flash_obstacle(device: torch.device, dtype: torch.dtype, name: str = "flash_attention_2") -> str:
    """What keeps a FlashAttention from running, in words; empty if nothing does."""
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    if device.type != "cuda":
        return f"it needs a CUDA device and this model is on {device.type!r}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it needs float16 or bfloat16 weights and these are {str(dtype).removeprefix('torch.')}"
    if name == "flash_attention_3":
        if torch.cuda.get_device_capability(device)[0] != _HOPPER:
            return "it runs on Hopper GPUs (H100, H200) only"
        return "" if is_flash_attn_3_available() else "the package flash-attn-3 (flash_attn_interface) is not installed"
    return "" if is_flash_attn_2_available() else "the package flash-attn is not installed"
