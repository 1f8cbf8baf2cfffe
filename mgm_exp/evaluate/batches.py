"""Which questions are asked together: decided once, from prompt lengths and images alone.

Long prompts come first, so that what does not fit into memory shows at once and the time that is left is not
underestimated. Questions about one image follow each other, and images with prompts of similar length stand together:
little is padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PLAN_VERSION = 2


@dataclass(frozen=True)
class PlannedBatch:
    """Questions (by place) that are asked together, and the images that no earlier batch needed."""

    questions: tuple[int, ...]
    new_images: tuple[str, ...]


def plan_batches(lengths: Sequence[int], images: Sequence[str], batch_size: int) -> list[PlannedBatch]:
    """Splits questions into batches; every question is in exactly one, every image is new in exactly one.

    Args:
        lengths: Tokens of each prompt.
        images: Image of each question.
        batch_size: Most questions in a batch.
    """
    longest: dict[str, int] = {}
    for image, length in zip(images, lengths, strict=True):
        longest[image] = max(longest.get(image, 0), length)
    order = sorted(range(len(images)), key=lambda i: (-longest[images[i]], images[i], -lengths[i], i))
    batches, seen = [], set[str]()
    for start in range(0, len(order), batch_size):
        places = tuple(order[start : start + batch_size])
        new = tuple(dict.fromkeys(images[i] for i in places if images[i] not in seen))
        seen.update(new)
        batches.append(PlannedBatch(places, new))
    return batches


def blocks(batches: Sequence[int], processes: int) -> list[list[int]]:
    """Neighbouring batches (by number) that one process takes at a time: they share images. None is empty.

    Four blocks a process: whoever is done earlier takes the next one.
    """
    size = max(1, -(-len(batches) // (4 * processes)))
    return [list(batches[start : start + size]) for start in range(0, len(batches), size)]
