"""Agreement of scores with measurements, with bootstrap intervals; needs only numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
# Of two arrays, shape (..., n), paired along the last axis: one number for each of the others.
Statistic = Callable[[Numbers, Numbers], Numbers]
DRAWS = 2000
LEVEL = 95  # %
FEWEST = 5  # pairs: an interval of fewer says nothing


class Estimate(NamedTuple):
    """A statistic with the ends of its bootstrap interval; NaN if it is not defined."""

    value: float
    low: float
    high: float


def pearson(x: Numbers, y: Numbers) -> Numbers:
    """Return the correlation coefficient r; NaN if x or y does not vary."""
    # Their deviations from the mean, which roundoff may leave, would be taken for variation.
    constant = (np.ptp(x, axis=-1) == 0) | (np.ptp(y, axis=-1) == 0)
    x, y = (values - values.mean(axis=-1, keepdims=True) for values in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        r = (x * y).sum(-1) / np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    return np.where(constant, np.nan, r)


def spearman(x: Numbers, y: Numbers) -> Numbers:
    """Return the correlation coefficient ρ of the ranks; equal numbers share their mean rank."""
    return pearson(_ranks(x), _ranks(y))


def kendall(x: Numbers, y: Numbers) -> Numbers:
    """Return Kendall's τ_b, from the pairs in equal and in opposite order, corrected for ties."""
    x, y = (np.sign(values[..., :, None] - values[..., None, :]) for values in (x, y))
    axes = (-2, -1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum(axes) / np.sqrt((x**2).sum(axes) * (y**2).sum(axes))


def rmse(x: Numbers, y: Numbers) -> Numbers:
    """Return the root mean square difference, in the unit of the numbers."""
    return np.sqrt(((x - y) ** 2).mean(-1))


def _ranks(values: Numbers) -> Numbers:
    """Return ranks that start at 1; equal numbers share their mean rank."""
    own, others = values[..., :, None], values[..., None, :]
    return (others < own).sum(-1) + ((others == own).sum(-1) + 1) / 2


def bootstrap(statistic: Statistic, x: Numbers, y: Numbers, *, draws: int = DRAWS) -> Estimate:
    """Return a statistic of all pairs, and its interval over pairs drawn with replacement.

    A draw that does not vary has no correlation and does not count. Fewer than ``FEWEST`` pairs
    have no interval.
    """
    chosen = np.random.default_rng(0).integers(len(x), size=(draws, len(x)))
    drawn = statistic(x[chosen], y[chosen])
    drawn = drawn[np.isfinite(drawn)]
    value = float(statistic(x, y))
    if len(x) < FEWEST or not drawn.size or not np.isfinite(value):
        return Estimate(value, np.nan, np.nan)
    low, high = np.percentile(drawn, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return Estimate(value, float(low), float(high))


def mean_of_the_others(measured: Numbers) -> Numbers:
    """Predict each number as the mean of all others, shape (n,); NaN if there is only one."""
    n = len(measured)
    return (measured.sum() - measured) / (n - 1) if n > 1 else np.full(n, np.nan)


def fitted_to_the_others(score: Numbers, measured: Numbers) -> Numbers:
    """Predict each measured number by a straight line through all others, shape (n,).

    The prediction is NaN if fewer than two others have different scores.
    """
    predicted = np.full(len(score), np.nan)
    for index in range(len(score)):
        others = np.arange(len(score)) != index
        x, y = score[others], measured[others]
        if len({*x.tolist()}) > 1:
            deviation = x - x.mean()
            slope = (deviation * y).sum() / (deviation**2).sum()
            predicted[index] = y.mean() + slope * (score[index] - x.mean())
    return predicted
