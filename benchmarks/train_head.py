"""The language head and its loss, forward and backward: at supervised positions, against logits of all positions.

4 rows of 700 positions (576 of an image, 124 of text, of which 40 are learnt), width 1,024 and 32,000 words: the
proportions of MGM-2B, whose 2,048 and 256,000 would take minutes here. The head is frozen, as in LoRA. The peer is what
transformers does: the head on all positions, ``ForCausalLMLoss`` in fp32. CPU time of the process, one thread, repeats
alternated; memory is PyTorch's own count of live tensors above hidden states and weight.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.measurement import Row

REPEATS, REPEATS_QUICK = 3, 1
ROWS, POSITIONS, LEARNT, WIDTH, WORDS = 4, 700, 40, 1024, 32_000
GOAL = 1.15
NEAR = 1e-5
MIB = 1024**2


def run(work: Path, quick: bool = False) -> list[Row]:
    """Time and memory of both."""
    import torch

    torch.set_num_threads(1)
    made = _part(*((2, 96, 12, 64, 500) if quick else (ROWS, POSITIONS, LEARNT, WIDTH, WORDS)))
    forms = {"ours": _ours, "peer": _peer}
    for form in forms.values():
        form(*_part(1, 8, 2, 8, 16))  # imports
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    found: dict[str, tuple[Any, Any]] = {}
    for repeat in range(REPEATS_QUICK if quick else REPEATS):
        for name in sorted(forms, reverse=repeat % 2 == 1):
            began = time.process_time()
            found[name] = forms[name](*made)
            seconds[name].append(time.process_time() - began)
    (loss, gradient), (their_loss, their_gradient) = found["ours"], found["peer"]
    apart = max(
        float((loss - their_loss).abs() / their_loss.abs()),
        float((gradient - their_gradient).abs().max() / their_gradient.abs().max()),
    )
    exactness = f"tolerance: loss and gradient {'within' if apart <= NEAR else 'DIFFER:'} {apart:.1g} of the largest"
    ratios = [peer / ours for ours, peer in zip(seconds["ours"], seconds["peer"], strict=True)]
    memory = {name: _memory(form, made) / MIB for name, form in forms.items()}
    what = "the head and its loss, forward and backward"
    return [
        Row(
            f"{what}: time",
            "s",
            statistics.median(seconds["ours"]),
            statistics.median(seconds["peer"]),
            None if quick else GOAL,
            exactness,
            f"{ROWS} x {POSITIONS} positions, {LEARNT} learnt each, {WORDS:,} words, fp32, one thread, CPU time; "
            f"ratios {', '.join(f'{ratio:.1f}' for ratio in ratios)}",
        ),
        Row(f"{what}: memory", "MiB", memory["ours"], memory["peer"], None, exactness, "most that is alive at a time"),
    ]


def _part(rows: int, positions: int, learnt: int, width: int, words: int) -> tuple[Any, Any, Any]:
    """Head, hidden states and labels."""
    import torch

    from mgm_exp.model.head import LanguageHead

    draw = torch.Generator().manual_seed(0)
    head = LanguageHead(width, words)
    with torch.no_grad():
        head.weight.copy_(torch.randn(words, width, generator=draw) * 0.02)
    head.requires_grad_(False)
    labels = torch.full((rows, positions), -100)
    labels[:, -learnt:] = torch.randint(words, (rows, learnt), generator=draw)
    return head, torch.randn(rows, positions, width, generator=draw), labels


def _ours(head: Any, hidden: Any, labels: Any) -> tuple[Any, Any]:
    """As :meth:`MGMForConditionalGeneration.loss` does it."""
    leaf = hidden.detach().requires_grad_()
    target = labels[:, 1:].flatten()
    kept = (target != -100).nonzero().squeeze(1)
    loss = head(leaf[:, :-1].flatten(0, 1)[kept], target[kept]) / len(kept)
    loss.backward()
    return loss.detach(), leaf.grad


def _peer(head: Any, hidden: Any, labels: Any) -> tuple[Any, Any]:
    from transformers.loss.loss_utils import ForCausalLMLoss

    leaf = hidden.detach().requires_grad_()
    loss = ForCausalLMLoss(head(leaf), labels, vocab_size=head.out_features)
    loss.backward()
    return loss.detach(), leaf.grad


def _memory(form: Any, made: tuple[Any, Any, Any]) -> float:
    from benchmarks.accounting import LiveMemory

    memory = LiveMemory()
    with memory:
        form(*made)
    return float(memory.peak)
