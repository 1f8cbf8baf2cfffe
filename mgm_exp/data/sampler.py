"""In which order samples are seen: the official grouping by length and modality, in orders of our own seeds.

The micro-batches of a global batch get even total lengths, and batches of text alone and of images alone are kept
apart, so that no process waits for another. (The official grouping does not put similar lengths into one micro-batch:
it evens out work, it does not save padding.) Source: mgm/train/llava_trainer.py (`get_length_grouped_indices`,
`get_modality_length_grouped_indices`); the same indices come out for the same draws (tests hold it to recorded ones).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch

IMAGE_WORDS = 128
"""Words that an image counts for when samples are grouped by length alone (official constant)."""
POOL = 50
"""Global batches that are sorted together by :func:`like_length`, at most."""


def length_grouped(
    lengths: Sequence[int], micro_batch_size: int, n_micro: int, generator: torch.Generator | None = None
) -> list[int]:
    """A random order in which each global batch is sorted into micro-batches of even total length.

    Args:
        lengths: Length of each sample, above 0.
        micro_batch_size: Samples of one micro-batch.
        n_micro: Micro-batches of one global batch, over all processes and accumulation steps.
        generator: Draws the order; None: torch's global one.

    Returns:
        Every index once. Global batch i is ``order[i * G : (i + 1) * G]`` with ``G = micro_batch_size * n_micro``, and
        its micro-batches follow each other.
    """
    drawn = torch.randperm(len(lengths), generator=generator).tolist()
    size = micro_batch_size * n_micro
    order: list[int] = []
    for start in range(0, len(drawn), size):
        longest_first = sorted(drawn[start : start + size], key=lambda i: -lengths[i])
        for micro_batch in _even_split(longest_first, lengths, n_micro):
            order += micro_batch
    return order


def like_length(lengths: Sequence[int], size: int, generator: torch.Generator | None = None) -> list[int]:
    """A random order in which the samples of each global batch are of like length: the least padding.

    Pools of :data:`POOL` global batches, fewer where that would be more than a quarter of all, are drawn, sorted and
    cut; the batches come in random order. This is how transformers' ``group_by_length`` draws, but for the batches'
    order, which there goes from long to short in each pool.

    Args:
        lengths: Length of each sample.
        size: Samples of one global batch.
        generator: Draws the order; None: torch's global one.

    Returns:
        Every index once, global batch after global batch, the longest sample of each first; one that is not full is the
        last.
    """
    drawn = torch.randperm(len(lengths), generator=generator).tolist()
    pool = size * min(POOL, max(1, len(lengths) // (4 * size)))
    batches = []
    for start in range(0, len(drawn), pool):
        longest_first = sorted(drawn[start : start + pool], key=lambda i: -lengths[i])
        batches += [longest_first[at : at + size] for at in range(0, len(longest_first), size)]
    last = [batches.pop()] if batches and len(batches[-1]) < size else []
    turns = torch.randperm(len(batches), generator=generator).tolist()
    return [i for batch in [*(batches[turn] for turn in turns), *last] for i in batch]


def modality_length_grouped(
    signed_lengths: Sequence[int],
    micro_batch_size: int,
    n_micro: int,
    generator: torch.Generator | None = None,
    batch_generator: torch.Generator | None = None,
) -> list[int]:
    """As :func:`length_grouped`, and a global batch holds either samples with images or without.

    What is left over of both kinds comes last, mixed.

    Args:
        signed_lengths: Length of each sample: positive with an image, negative without; never 0.
        micro_batch_size, n_micro: As for :func:`length_grouped`.
        generator: Draws the orders within both kinds; None: torch's global one.
        batch_generator: Draws the order of the global batches; None: torch's global one.

    Raises:
        ValueError: a length is 0.
    """
    if not all(signed_lengths):
        raise ValueError(f"sample {list(signed_lengths).index(0)} has length 0, so its modality is unknown")
    kinds = [[i for i, n in enumerate(signed_lengths) if n > 0], [i for i, n in enumerate(signed_lengths) if n < 0]]
    if not all(kinds):
        return length_grouped([abs(n) for n in signed_lengths], micro_batch_size, n_micro, batch_generator)
    size = micro_batch_size * n_micro
    batches: list[list[int]] = []
    left_over: list[int] = []
    for indices in kinds:
        lengths = [abs(signed_lengths[i]) for i in indices]
        order = [indices[i] for i in length_grouped(lengths, micro_batch_size, n_micro, generator)]
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        # The official code sets the last batch of each kind aside, whether it is full or not.
        left_over += parts.pop()
        batches += parts
    shuffled = torch.randperm(len(batches), generator=batch_generator).tolist()
    return [i for number in shuffled for i in batches[number]] + sorted(left_over)


def _even_split(indices: list[int], lengths: Sequence[int], n_parts: int) -> list[list[int]]:
    """Equally many samples for each part, each sample to the part that is shortest so far (the first of equal ones)."""
    if len(indices) % n_parts:
        return [indices[part::n_parts] for part in range(n_parts)]
    room = len(indices) // n_parts
    parts: list[list[int]] = [[] for _ in range(n_parts)]
    shortest = [(0, part) for part in range(n_parts)]
    for index in indices:
        total, part = heapq.heappop(shortest)
        parts[part].append(index)
        if len(parts[part]) < room:
            heapq.heappush(shortest, (total + lengths[index], part))
    return parts
