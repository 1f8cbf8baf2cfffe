"""Statistics of images: how many, how large, in which formats, which cannot be used, which look the same."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mgm_exp.data.exploration.grouping import groups_of
from mgm_exp.data.exploration.image_facts import ImageFacts
from mgm_exp.data.exploration.perceptual_hash import look_alikes

if TYPE_CHECKING:
    import numpy as np

BLANK_CONTRAST = 4.0
"""Images whose grey values spread less (standard deviation, of 255) show next to nothing."""
MISSING_KINDS = ("missing",)
_PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


@dataclass(frozen=True)
class ImageGroups:
    """Images that are the same, as places in the facts.

    Args:
        identical: Files with the same bytes.
        alike: Images that look the same; identical ones are members too.
        blank: Images that show next to nothing, most even first.
    """

    identical: list[list[int]]
    alike: list[list[int]]
    blank: list[int]


def image_groups(facts: ImageFacts) -> ImageGroups:
    """Finds images that occur more than once, and empty ones."""
    import numpy as np

    usable = np.flatnonzero(facts.is_usable)
    _, first, number = np.unique(facts.sha256[usable], return_index=True, return_inverse=True)
    order = np.argsort(number, kind="stable")
    is_again = np.flatnonzero(number[order][1:] == number[order][:-1])
    pairs = [(int(usable[order[i]]), int(usable[order[i + 1]])) for i in is_again]
    identical = groups_of(pairs)
    distinct = usable[np.sort(first)]
    near = look_alikes(facts.hash[distinct], facts.glimpse[distinct])
    joined = groups_of(pairs + [(int(distinct[group[0]]), int(distinct[i])) for group in near for i in group[1:]])
    blank = usable[facts.contrast[usable] < BLANK_CONTRAST]
    return ImageGroups(identical, joined, blank[np.argsort(facts.contrast[blank], kind="stable")].tolist())


def image_statistics(facts: ImageFacts, groups: ImageGroups, rows_without: int, shared_paths: int) -> dict[str, Any]:
    """The ``images`` of ``explore.json``.

    Args:
        facts: Of every distinct image path.
        groups: See :func:`image_groups`.
        rows_without: Rows that name no image.
        shared_paths: Image paths that several rows name.
    """
    usable = facts.is_usable
    width, height, size = facts.width[usable], facts.height[usable], facts.bytes[usable]
    kinds = Counter(fault.kind for fault in facts.faults.values())
    missing = sum(kinds[kind] for kind in MISSING_KINDS)
    return {
        "count": len(facts),
        "usable": int(usable.sum()),
        "missing": missing,
        "broken": sum(kinds.values()) - missing,
        "faults": dict(kinds.most_common()),
        "rows_without_image": rows_without,
        "shared_by_rows": shared_paths,
        "width_mean": _mean(width),
        "height_mean": _mean(height),
        "width_percentiles": _percentiles(width),
        "height_percentiles": _percentiles(height),
        "aspect_percentiles": _percentiles(width / height.clip(1)),
        "bytes_mean": _mean(size),
        "bytes_total": int(size.sum()),
        "bytes_percentiles": _percentiles(size),
        "formats": _counted(facts.format, facts.format_names),
        "modes": _counted(facts.mode, facts.mode_names),
        "blank": len(groups.blank),
        "identical_groups": len(groups.identical),
        "duplicate_groups": len(groups.alike),
        "duplicate_images": sum(len(group) - 1 for group in groups.alike),
    }


def _counted(values: np.ndarray, names: list[str]) -> dict[str, int]:
    counts = Counter({name: int((values == place).sum()) for place, name in enumerate(names)})
    return dict(counts.most_common())


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _percentiles(values: np.ndarray) -> dict[str, float]:
    import numpy as np

    return {str(p): float(np.percentile(values, p)) for p in _PERCENTILES} if len(values) else {}
