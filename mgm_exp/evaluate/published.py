"""What MGM-2B's authors published, to be shown beside a run's own score, with the sampling error of the benchmark."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SOURCE = "MGM's README and table 1 of arXiv 2403.18814"


@dataclass(frozen=True)
class Published:
    """A published score of MGM-2B (336/768).

    Args:
        benchmark: Its name here.
        metric: The metric of ``result.json`` that it is comparable with.
        value: In the metric's own unit.
        n: Questions that it is a share of; None: the score is no share.
        needs: Entries of the evaluation key without which scores are not comparable.
    """

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


PUBLISHED = (
    Published("textvqa", "textvqa/accuracy", 0.562, 5000, {"n": 5000, "ocr_tokens": True, "split": "val"}),
    Published("mmbench", "mmbench/circular_accuracy", 0.598, 1164, {"n_questions": 1164, "split": "dev"}),
    Published("mme", "mme/perception", 1341.0, None, {"n": 2374}),
    Published("mme", "mme/cognition", 312.0, None, {"n": 2374}),
    Published("mmmu", "mmmu/accuracy", 0.317, 900, {"n": 900, "split": "validation"}),
)


def published(benchmark: str, eval_key: Mapping[str, Any]) -> list[Published]:
    """The published scores that a result of this key may stand beside."""
    return [one for one in PUBLISHED if one.benchmark == benchmark and one.fits(eval_key)]
