"""Statistics that a few wild values do not move: medians, and deviations from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import TypeGuard

_SIGMA_OF_MAD = 1.4826  # Rousseeuw & Croux 1993: makes it the standard deviation of normal noise
_TINY = 1e-30


def log_of(value: float) -> float:
    """Its logarithm; zero counts as very small."""
    return math.log(max(value, _TINY))


def sigma(values: Sequence[float]) -> float:
    """The robust standard deviation: 1.4826 times the median absolute deviation from the median; 0 of nothing."""
    if not values:
        return 0.0
    middle = median(values)
    return _SIGMA_OF_MAD * median(abs(value - middle) for value in values)


def noise(values: Sequence[float]) -> float:
    """The standard deviation of the noise on a slowly changing series, from the differences of neighbours."""
    steps = [after - before for before, after in pairwise(values)]
    return sigma(steps) / math.sqrt(2)


def is_finite(value: object) -> TypeGuard[float]:
    """Whether it is a finite number, and no larger than a float can be."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
