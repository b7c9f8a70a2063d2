"""Poses with one weight that underflows: it is a subnormal number, or exactly 0."""

from __future__ import annotations

import math

import torch

from mtenn_core.testing._probe.poses import Poses
from mtenn_core.testing._probe.probes import GRID
from mtenn_core.testing._probe.subject import Subject

# exp(-x) of a float64 is 0 from 745 on, and has lost digits from 708 on.
TO_ZERO, TO_SUBNORMAL = 745.0, 708.0
N_POSES = 4
MOST_COLUMNS = 4
GAPS = 2.0 ** torch.arange(-3, 14)  # further away, predictions ± steps would not be exact


def underflowing_weights(subject: Subject) -> list[Poses]:
    """Return poses with ordinary weights, except one that is far from the others.

    The far pose lies above or below the others. At one distance its weight is 0, at the next it is
    subnormal, and at the last it is about 1e-300. There are none if no weight becomes 0.
    """
    n_columns = subject.probes.shape(1)[-1]
    return [
        poses
        for column in range(min(n_columns, MOST_COLUMNS))
        for sign in (1.0, -1.0)
        for poses in _on_one_side(subject, sign, column)
    ]


def _on_one_side(subject: Subject, sign: float, column: int) -> list[Poses]:
    """Return the poses of which one is far above or below the others."""
    low, high = subject.combination.domain
    near = subject.probes.poses(N_POSES, 0.0, 1.0)
    end = high if sign > 0 else low

    def at(gap: float) -> Poses | None:
        # The weights of the other poses are ordinary if they are as near as the scale of the
        # combination requires.
        predictions = near.predictions.clone()
        y = predictions if predictions.dim() == 1 else predictions[:, column]
        y = y[:1] + (y - y[:1]) * min(1.0, gap / TO_ZERO)
        y[-1] = y[:-1].amax() + gap if sign > 0 else y[:-1].amin() - gap
        y = torch.round(y * GRID) / GRID
        if not low < y[-1] < high or (math.isfinite(end) and abs(end - y[-1]) < 1e-3):
            return None
        predictions.view(len(near), -1)[:, column] = y
        return near.at(predictions)

    def vanishes(gap: float) -> bool:
        poses = at(gap)
        # A wrong weight may be NaN where the right one is 0.
        return poses is not None and not bool((subject.weights(poses)[-1].abs() > 0).any())

    gap = next(filter(vanishes, GAPS.tolist()), None)
    if gap is None:
        return []
    nonzero, zero = gap / 2, gap
    for _ in range(8):  # the interval of subnormal weights is 5 % wide
        middle = (nonzero + zero) / 2
        nonzero, zero = (nonzero, middle) if vanishes(middle) else (middle, zero)
    subnormal = (TO_ZERO + TO_SUBNORMAL) / 2 / TO_ZERO * zero
    gaps = (1.2 * zero, subnormal, 0.92 * zero)
    return [poses for poses in map(at, gaps) if poses is not None]
