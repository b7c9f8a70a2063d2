"""Derivatives by finite differences, each with an error bar.

Richardson's scheme extrapolates central differences D(h) for the steps h, h/2, h/4 … to h = 0, as
Ridders does (Advances in Engineering Software 4, 75, 1982). A stiff function, such as a sharp
smooth maximum, has false plateaus at large h. For such functions, the error bar needs three
additions:

- It is never smaller than the roundoff.
- It includes the differences from the results at the next larger and the next smaller step.
  Ridders' scheme compares only with the results of lower order, which is not enough.
- It is infinite if any smaller step contradicts the extrapolated derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

N_STEPS = 28
ORDER = 6
# Roundoff of a value, in units in the last place of its inputs.
ULPS = 32
FLOAT32, FLOAT64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps


class Estimate(NamedTuple):
    """Directional derivatives and their uncertainty, both of shape (n,).

    The error is infinite if smaller steps contradict every extrapolated derivative.
    """

    derivative: Tensor
    error: Tensor


def directional_derivatives(
    function: Callable[[Tensor], Tensor],
    points: Tensor,
    directions: Tensor,
    first_steps: Tensor,
    if_constant: float = FLOAT64,
) -> Estimate:
    """Differentiate a scalar function at several points, in one direction at each point.

    Parameters
    ----------
    function : maps points of shape (batch, n_inputs) to values of shape (batch,)
    points : shape (n, n_inputs), float64
    directions : shape (n, n_moved). The first ``n_moved`` inputs move, and the others do not.
        Numbers with few binary digits make ``point ± h · direction`` exact
    first_steps : shape (n,), powers of two. These are the largest steps
    if_constant : unit roundoff of the function if its values do not show it, see :func:`resolution`

    Returns
    -------
    Estimate, in the unit of the function divided by the unit of its inputs
    """
    return extrapolate([climb(function, points, directions, first_steps, if_constant)])


class Ladder(NamedTuple):
    """Central differences at each step, and their roundoff, both of shape (n, n_steps)."""

    differences: Tensor
    noise: Tensor


def climb(
    function: Callable[[Tensor], Tensor],
    points: Tensor,
    directions: Tensor,
    first_steps: Tensor,
    if_constant: float = FLOAT64,
) -> Ladder:
    """Return the central differences that :func:`directional_derivatives` extrapolates.

    Parameters
    ----------
    function, points, directions, first_steps, if_constant : see :func:`directional_derivatives`
    """
    steps, values = _ladder(function, points, directions, first_steps)
    magnitude = torch.maximum(
        values.nan_to_num(0, 0, 0).abs().amax(dim=(0, 2)), points.abs().amax(dim=1)
    )
    changes = values[0] - values[1]
    # At the smallest steps the value is linear, so its change is half of the change at the step
    # before. The rest is roundoff. This includes the roundoff of large intermediate results.
    scatter = (changes[:, -6:-1] - 2 * changes[:, -5:]).nan_to_num().abs().amax(dim=1)
    noise = torch.maximum(ULPS * resolution(values, if_constant) * magnitude, 4 * scatter)
    noise = torch.maximum(noise, 4 * _quantum(changes, magnitude))
    return Ladder(changes / (2 * steps), noise[:, None] / steps)


def extrapolate(ladders: Sequence[Ladder]) -> Estimate:
    """Extrapolate all central differences to step 0, in the order of ``ladders``."""
    return _extrapolate(*map(torch.cat, zip(*ladders, strict=True)))


def _quantum(changes: Tensor, magnitude: Tensor) -> Tensor:
    """Return the smallest nonzero change of a value if the smallest step changes nothing, else 0.

    This happens if a part of the function computes in float32, which rounds small steps to zero.
    Then the change has the size of float32's last digits, and twice the step changes the value by
    one to three times as much. Otherwise there is a kink near the point, and the value is constant
    up to the kink, as a maximum is.

    Parameters
    ----------
    changes : shape (n, n_steps), from the largest step to the smallest
    magnitude : largest size of the inputs and values, shape (n,)

    Returns
    -------
    shape (n,)
    """
    sizes = torch.where(changes == 0, torch.inf, changes.abs())
    smallest, step = sizes.min(dim=1)
    at_twice_the_step = sizes.gather(1, (step - 1).clamp(min=0)[:, None])[:, 0]
    is_rounding = (smallest <= 8 * FLOAT32 * magnitude) & (at_twice_the_step <= 4 * smallest)
    stuck = (changes[:, -1] == 0) & smallest.isfinite() & is_rounding
    return torch.where(stuck, smallest, 0.0)


def central_differences(
    function: Callable[[Tensor], Tensor], point: Tensor, direction: Tensor, first_step: float
) -> tuple[Tensor, Tensor]:
    """Return steps, and the central difference at each of them, both of shape (n_steps,).

    Parameters
    ----------
    function, point, direction, first_step : see :func:`directional_derivatives`, for one point
    """
    steps, values = _ladder(function, point[None], direction[None], torch.tensor([first_step]))
    return steps[0], (values[0] - values[1])[0] / (2 * steps[0])


def _ladder(
    function: Callable[[Tensor], Tensor], points: Tensor, directions: Tensor, first_steps: Tensor
) -> tuple[Tensor, Tensor]:
    """Return steps, and the values at both ends of each step.

    Returns
    -------
    shapes (n, n_steps) and (2, n, n_steps)
    """
    steps = first_steps[:, None] * 0.5 ** torch.arange(N_STEPS, dtype=points.dtype)
    n_fixed = points.shape[1] - directions.shape[1]
    moves = torch.nn.functional.pad(steps[..., None] * directions[:, None], (0, n_fixed))
    ladder = torch.stack([points[:, None] + moves, points[:, None] - moves])
    return steps, function(ladder.flatten(0, 2)).view(ladder.shape[:-1])


def resolution(values: Tensor, if_constant: float = FLOAT64) -> float:
    """Return the unit roundoff of the arithmetic that computed the values.

    If a function computes in a smaller dtype than float64, all its values are numbers of this
    dtype. Hundreds of float64 values are not numbers of a smaller dtype by chance.

    Parameters
    ----------
    if_constant : the result if there are fewer than two different values, which do not show it. For
        example, zero is a number of every dtype
    """
    finite = values[values.isfinite()]
    if not (finite != finite[:1]).any():
        return if_constant
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if torch.equal(finite.to(dtype).to(values.dtype), finite):
            return torch.finfo(dtype).eps
    return torch.finfo(values.dtype).eps


def _extrapolate(differences: Tensor, noise: Tensor) -> Estimate:
    """Extrapolate central differences to step 0.

    Parameters
    ----------
    differences, noise : shape (n, n_steps), from the largest step to the smallest
    """
    column, floor = differences, noise
    values, errors = [], []
    for order in range(1, ORDER + 1):
        factor = 4.0**order
        finer, coarser = column[:, 1:], column[:, :-1]
        column = finer + (finer - coarser) / (factor - 1)
        floor = (factor * floor[:, 1:] + floor[:, :-1]) / (factor - 1)
        error = torch.maximum((column - finer).abs(), (column - coarser).abs()) + floor
        change = (column[:, 1:] - column[:, :-1]).abs()
        error[:, :-1] = torch.maximum(error[:, :-1], change)
        error[:, 1:] = torch.maximum(error[:, 1:], change)
        error[_contradicted(column, error, differences, noise)] = torch.inf
        values.append(column)
        errors.append(error.nan_to_num(torch.inf, torch.inf))
    error, best = torch.cat(errors, dim=1).min(dim=1)
    return Estimate(torch.cat(values, dim=1).gather(1, best[:, None]).squeeze(1), error)


def _contradicted(value: Tensor, error: Tensor, differences: Tensor, noise: Tensor) -> Tensor:
    """Return a mask of the values that a smaller step contradicts.

    Parameters
    ----------
    value, error : shape (n, n_steps - order); each uses a step and the ``order`` steps before it
    differences, noise : shape (n, n_steps)
    """
    # The error of D(h) is c h², so the change from D(2h) to D(h) is three times the error of D(h).
    change = (differences[:, 1:] - differences[:, :-1]).abs()
    allowed = error[:, :, None] + (change + noise[:, 1:])[:, None]
    against = (value[:, :, None] - differences[:, None, 1:]).abs() > allowed
    # value[k] uses the steps up to k + order. The last axis of `against` starts at step 1.
    order = differences.shape[1] - value.shape[1]
    last_used = torch.arange(value.shape[1])[:, None] + order
    finer = torch.arange(1, differences.shape[1]) > last_used
    return (against & finer).any(dim=2)
