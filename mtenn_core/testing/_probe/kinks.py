"""Kinks of the value: points at which its slope jumps."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mtenn_core.testing._probe.comparison import Comparison
from mtenn_core.testing._probe.finite_differences import ULPS, resolution
from mtenn_core.testing._probe.poses import Poses
from mtenn_core.testing._probe.subject import Subject

KINK = (
    "the value has a kink here: its slope jumps, as that of max, min, topk, median, sort, clamp or"
    " relu does. Declare smooth = False if you intend this"
)
# A smooth value with a scale of 1000 per unit has nearly straight lines at these steps.
STEPS = 2.0 ** -torch.arange(16, 23, 3, dtype=torch.float64)
N_DIRECTIONS = 6


def kink_cause(subject: Subject, comparisons: Iterable[Comparison]) -> str:
    """Return :data:`KINK` if the value has a kink at each wrong comparison, else "".

    A wrong weight is also wrong at points without a kink.
    """
    wrong = {id(c.predictions): c.poses for c in comparisons if c.wrong}
    return KINK if wrong and all(at_kink(subject, poses) for poses in wrong.values()) else ""


def at_kink(subject: Subject, poses: Poses) -> bool:
    """Return True if the slope of the value jumps at these predictions.

    At a kink, the slopes along two directions do not add up to the slope along their sum. The sum
    is 0 if a direction and its opposite are compared. A single axis may not show a kink: the median
    of three equal predictions stays the same if one of them moves.
    """
    y = poses.predictions.flatten()
    generator = torch.Generator().manual_seed(subject.seed)
    # Numbers with few binary digits make predictions ± step · direction exact.
    shape = N_DIRECTIONS, len(y)
    directions = (torch.randint(-16, 17, shape, generator=generator) / 16).to(y.dtype)
    sums = directions + directions.roll(1, dims=0)
    along = torch.stack([directions, -directions, sums])
    moved = (y + STEPS[:, None, None, None] * along).flatten(0, 2)
    # The last digits of the last two values show the dtype of the arithmetic.
    generic = torch.stack([y * (1 - 1e-9 * k / 3) for k in (1, 2)])

    def at(numbers: Tensor) -> Poses:
        return poses.at(numbers.view_as(poses.predictions))

    try:
        values = subject.values(
            torch.stack([at(each).row() for each in torch.cat([y[None], moved, generic])])
        )
    except Exception:  # the predictions may be invalid
        return False
    noise = ULPS * resolution(values) * torch.maximum(values.abs().amax(), y.abs().amax())
    shape_of_changes = len(STEPS), len(along), N_DIRECTIONS
    changes = (values[1 : 1 + len(moved)] - values[0]).view(shape_of_changes)
    up, down, both = (changes / STEPS[:, None, None]).unbind(1)
    jumps = torch.cat([up + down, up + up.roll(1, dims=1) - both], dim=1)
    # At a kink the jump is the same for each step. Elsewhere, it falls with the step.
    lowest = jumps.abs().amin(0)
    same = jumps.amax(0) - jumps.amin(0) <= 0.1 * lowest
    size = torch.maximum(up.abs().amax(), down.abs().amax())
    large = lowest > 1e-3 * size + 8 * noise / STEPS[-1]
    return bool((same & large & lowest.isfinite()).any())
