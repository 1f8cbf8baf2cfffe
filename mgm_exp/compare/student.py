"""Student's t distribution, for differences whose standard error rests on few seeds or few questions. Only numpy."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from mgm_exp.compare.statistics import Floats

_STEPS = 400
_TINY = 1e-300


def two_sided_p(t: ArrayLike, df: ArrayLike) -> Floats:
    """P(|T| >= |t|) for each t and number of degrees of freedom (any positive number, also infinite).

    Source: Abramowitz and Stegun 26.7.1 with 26.5.8 (regularised incomplete beta function).
    """
    values, freedom = np.broadcast_arrays(np.abs(np.asarray(t, dtype=np.float64)), np.asarray(df, dtype=np.float64))
    if not (freedom > 0).all():
        raise ValueError("degrees of freedom must be above 0")
    shape = values.shape
    values = values.ravel()
    freedom = np.minimum(freedom.ravel(), 1e7)  # from there on it is the normal distribution
    square = np.minimum(values, 1e100) ** 2
    # 1 - x is not computed from x: near 1 it would lose its digits.
    p = _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + square), square / (freedom + square))
    return np.asarray(np.clip(p, 0.0, 1.0).reshape(shape))


def quantile(probability: float, df: float) -> float:
    """The t below which a share ``probability`` (0.5 to 1, excluded) lies: 2.776 for 0.975 and 4 degrees of freedom."""
    if not 0.5 < probability < 1:
        raise ValueError(f"probability={probability} must lie between 0.5 and 1, both excluded")
    if df > 1e5:  # one term beyond the normal distribution is exact to ten digits
        z = NormalDist().inv_cdf(probability)
        return z + (z**3 + z) / (4 * df)
    wanted, t = 2 * (1 - probability), 0.0
    while float(two_sided_p(max(1.0, 2 * t), df)) > wanted:
        t = max(1.0, 2 * t)
    # p falls and is convex: Newton's steps from the left never pass the root.
    log_front = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
    for _ in range(_STEPS):
        density = math.exp(log_front - (df + 1) / 2 * math.log1p(t * t / df))
        step = (float(two_sided_p(t, df)) - wanted) / (2 * density)
        t += step
        if abs(step) <= 1e-12 * t:
            break
    return t


def _incomplete_beta(a: Floats, b: float, x: Floats, y: Floats) -> Floats:
    """Regularised I_x(a, b), with y = 1 - x, by the continued fraction on the side where it converges fast."""
    swap = x > (a + 1) / (a + b + 2)
    first, second = np.where(swap, b, a), np.where(swap, a, b)
    z, rest = np.where(swap, y, x), np.where(swap, x, y)
    sides = zip(first.tolist(), second.tolist(), strict=True)
    log_beta = np.array([math.lgamma(p) + math.lgamma(q) - math.lgamma(p + q) for p, q in sides])
    with np.errstate(divide="ignore"):
        front = np.exp(first * np.log(z) + second * np.log(rest) - log_beta) / first
    value = front * _continued_fraction(first, second, z)
    return np.where(swap, 1 - value, value)


def _continued_fraction(a: Floats, b: Floats, x: Floats) -> Floats:
    """Lentz's method (Numerical Recipes, section 6.4)."""
    c = np.ones_like(x)
    d = 1 / _apart_from_zero(1 - (a + b) * x / (a + 1))
    result = d.copy()
    for m in range(1, _STEPS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1 / _apart_from_zero(1 + even * d)
        c = _apart_from_zero(1 + even / c)
        result *= d * c
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / _apart_from_zero(1 + odd * d)
        c = _apart_from_zero(1 + odd / c)
        change = d * c
        result *= change
        if np.abs(change - 1).max(initial=0.0) < 1e-14:
            break
    return result


def _apart_from_zero(values: Floats) -> Floats:
    return np.where(np.abs(values) < _TINY, _TINY, values)
