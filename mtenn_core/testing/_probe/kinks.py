"""Kinks of the value: points at which its slope jumps."""

from __future__ import annotations

from collections.abc import Iterable

import torch

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
    """Return True if the slope of the value jumps at these predictions, in some direction.

    A single axis may not show it: the median of three equal predictions stays the same if one of
    them moves.
    """
    y = poses.predictions
    generator = torch.Generator().manual_seed(subject.seed)
    # Numbers with few binary digits make predictions ± step · direction exact.
    directions = torch.randint(-16, 17, (N_DIRECTIONS, len(y)), generator=generator) / 16
    moves = STEPS[:, None, None] * directions.to(y.dtype)
    moved = torch.cat([y[None], (y + moves).flatten(0, 1), (y - moves).flatten(0, 1)])
    # The last digits of these values show the dtype of the arithmetic.
    generic = torch.stack([y * (1 - 1e-9 * k / 3) for k in (1, 2)])
    try:
        values = subject.values(
            torch.stack([poses.at(each).row() for each in torch.cat([moved, generic])])
        )
    except Exception:  # the predictions may be invalid
        return False
    noise = ULPS * resolution(values) * torch.maximum(values.abs().amax(), y.abs().amax())
    here, moved_values = values[0], values[1 : len(moved)]
    up, down = moved_values.view(2, len(STEPS), N_DIRECTIONS)
    jumps = (up - 2 * here + down) / STEPS[:, None]
    size = ((up - down) / (2 * STEPS[:, None])).abs().amax() + jumps.abs().amax()
    lowest, highest = jumps.abs().aminmax(dim=0)
    # At a kink the jump is the same for each step. Elsewhere, it falls with the step.
    same = (jumps.amax(0) - jumps.amin(0)) <= 0.1 * lowest
    large = lowest > 1e-3 * size + 8 * noise / STEPS[-1]
    return bool((same & large & highest.isfinite()).any())
