"""What MGM's authors published, to be shown beside a run's own score, with the sampling error of the benchmark."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SOURCE = "MGM's README and table 1 of arXiv 2403.18814"


@dataclass(frozen=True)
class Published:
    """A published score.

    Args:
        model: By its authors' name.
        benchmark: Its name here.
        metric: The metric of ``result.json`` that it is comparable with.
        value: In the metric's own unit.
        n: Questions that it is a share of; None: the score is no share.
        needs: Entries of the evaluation key without which scores are not comparable.
    """

    model: str
    benchmark: str
    metric: str
    value: float
    n: int | None
    needs: Mapping[str, Any]

    @property
    def standard_error(self) -> float | None:
        """Of a share of n independent questions; None where the score is none."""
        return None if self.n is None else math.sqrt(self.value * (1 - self.value) / self.n)

    def fits(self, eval_key: Mapping[str, Any]) -> bool:
        """Whether a result was measured as the published one was: the same questions, as many of them."""
        return all(eval_key.get(key) == value for key, value in self.needs.items())


# How the published scores were measured; the last column: questions that the score is a share of.
_MEASURED: tuple[tuple[str, str, Mapping[str, Any], int | None], ...] = (
    ("textvqa", "textvqa/accuracy", {"n": 5000, "ocr_tokens": True, "split": "val"}, 5000),
    ("mmbench", "mmbench/circular_accuracy", {"n_questions": 1164, "split": "dev"}, 1164),
    ("mme", "mme/perception", {"n": 2374}, None),
    ("mme", "mme/cognition", {"n": 2374}, None),
    ("mmmu", "mmmu/accuracy", {"n": 900, "split": "validation"}, 900),
)
# In the order of _MEASURED; the HD models have 672/1536 pixels, the others 336/768. None: not published.
_SCORES: Mapping[str, tuple[float | None, ...]] = {
    "MGM-2B": (0.562, 0.598, 1341.0, 312.0, 0.317),
    "MGM-7B": (0.652, 0.693, 1523.0, 316.0, 0.361),
    "MGM-8B": (0.676, 0.727, 1606.0, 341.0, 0.382),
    "MGM-13B": (0.659, 0.685, 1565.0, 322.0, 0.381),
    "MGM-7B-HD": (0.684, 0.658, 1546.0, 319.0, 0.368),
    "MGM-8B-HD": (0.716, None, 1532.0, 357.0, 0.370),
    "MGM-13B-HD": (0.702, 0.686, 1597.0, 320.0, 0.373),
}
PUBLISHED = tuple(
    Published(model, benchmark, metric, value, n, needs)
    for model, values in _SCORES.items()
    for (benchmark, metric, needs, n), value in zip(_MEASURED, values, strict=True)
    if value is not None
)
# A model of another name stands beside the smallest.
DEFAULT = "MGM-2B"


def published(benchmark: str, eval_key: Mapping[str, Any], model: str = DEFAULT) -> list[Published]:
    """The published scores that a result of this key may stand beside.

    Args:
        benchmark: Its name here.
        eval_key: Of the result.
        model: Whose scores, by its authors' name.
    """
    return [one for one in PUBLISHED if one.model == model and one.benchmark == benchmark and one.fits(eval_key)]


def published_as(name: str, *, is_hd: bool) -> str:
    """Under which name the scores of a model are published.

    Args:
        name: ``model.name`` of a configuration: ``mgm_7b``, ...
        is_hd: Whether it sees crops (``image_grid`` of 2 or more).
    """
    from mgm_exp.model.known import KNOWN

    title = KNOWN[name].title.removesuffix("-HD") + ("-HD" if is_hd else "") if name in KNOWN else DEFAULT
    return title if title in _SCORES else DEFAULT
