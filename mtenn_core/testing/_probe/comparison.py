"""Comparisons of gradients from backward with finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtenn_core._engine.columns import Columns, named_column
from mtenn_core._engine.evaluation import NO_INPUTS, PoseInputs
from mtenn_core.testing._outcomes import Fail, Inconclusive, Metrics
from mtenn_core.testing._probe.finite_differences import Estimate
from mtenn_core.testing._probe.poses import Poses, listed

# A closed form may correctly contain a constant in float32.
FLOAT32 = 8 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Comparison:
    """A derivative from backward, and the same derivative by finite differences."""

    unit: str
    direction: Tensor
    predictions: Tensor
    analytic: float
    derivative: float
    error: float
    slack: float  # change of ``analytic`` if predictions move by two units in the last place
    scale: float  # the largest finite entry of the gradient
    inputs: PoseInputs
    of_predictions: bool = True
    against: str = "finite difference"
    shape: tuple[int, ...] = ()  # of what moves, if it has columns
    columns: Columns | None = None  # of the predictions, if these move

    @property
    def poses(self) -> Poses:
        """The predictions and the pose inputs."""
        return Poses(self.predictions, self.inputs, self.columns.names if self.columns else ())

    @property
    def tolerance(self) -> float:
        # Slack is limited. A gradient that jumps if only last digits change (a tie, a cache) is
        # wrong, unless the value jumps, too.
        slack = min(8 * self.slack, 1e-3 * self.scale)
        return 10 * self.error + slack + FLOAT32 * self.scale

    @property
    def off_by(self) -> float:
        """The error in units of the tolerance.

        It is infinite for NaN, and for an infinite number where the derivative is finite. Equal
        infinities are equal.
        """
        if self.analytic == self.derivative:
            return 0.0
        if math.isinf(self.analytic) and math.isfinite(self.derivative):
            return math.inf  # the error bar may be infinite, too
        return ratio(abs(self.analytic - self.derivative), self.tolerance)

    @property
    def conclusive(self) -> bool:
        """True if an error of one percent would exceed the tolerance."""
        return self.tolerance <= 0.01 * self.scale

    @property
    def wrong(self) -> bool:
        """True if a conclusive comparison differs, or if backward gives infinity or NaN."""
        return self.off_by > 1 and (self.conclusive or not math.isfinite(self.analytic))

    def __str__(self) -> str:
        relative = abs(self.analytic - self.derivative) / max(self.scale, 1e-300)
        where = f" {self._where()}, {self.poses}"
        return (
            f"{self.unit}{where if self.of_predictions else ''}\n"
            f"    your backward      {self.analytic:.10g}\n"
            f"    {self.against:<18} {self.derivative:.10g} ± {self.error:.1e}\n"
            f"    off by {relative:.1e} of the gradient, {self.off_by:.1e} times the tolerance"
        )

    def _where(self) -> str:
        if self.direction.count_nonzero() != 1:
            return f"direction [{listed(self.direction)}]"
        index = int(self.direction.abs().argmax())
        if len(self.shape) < 2:
            return f"{index} of {len(self.direction)}"
        place = [int(i) for i in torch.unravel_index(torch.tensor(index), self.shape)]
        if self.columns is None:  # an own parameter
            return f"{place} of shape {self.shape}"
        return f"{place[0]} of {self.shape[0]}{named_column(self.columns, place[1])}"


def compare(
    gradient_at: Callable[[Tensor], Tensor],
    fd: Estimate,
    directions: Tensor,
    predictions: Tensor,
    unit: str,
    inputs: PoseInputs = NO_INPUTS,
) -> list[Comparison]:
    """Compare a gradient of n entries with finite differences along ``directions``."""
    gradient = gradient_at(predictions).flatten()
    no_slack = torch.zeros(1, 1)
    comparisons = _comparisons(gradient, no_slack, fd, directions, predictions, unit, inputs)
    if any(comparison.off_by > 1 for comparison in comparisons):
        # This computes two more gradients, so do it only if an entry differs.
        changes = sensitivity(gradient_at, predictions, gradient).nan_to_num(0.0)
        slack = torch.stack([_along(directions, change) for change in changes])
        comparisons = _comparisons(gradient, slack, fd, directions, predictions, unit, inputs)
    return comparisons


def _comparisons(
    gradient: Tensor,
    slack: Tensor,
    fd: Estimate,
    directions: Tensor,
    predictions: Tensor,
    unit: str,
    inputs: PoseInputs,
) -> list[Comparison]:
    columns = zip(
        directions,
        _along(directions, gradient).tolist(),
        slack.abs().amax(0).expand(len(directions)).tolist(),
        fd.derivative.tolist(),
        fd.error.tolist(),
        strict=True,
    )
    # With an infinite entry as the scale, every tolerance would be infinite.
    scale = max(float(each.nan_to_num(0, 0, 0).abs().max()) for each in (gradient, fd.derivative))
    return [
        Comparison(unit, direction, predictions, analytic, derivative, error, change, scale, inputs)
        for direction, analytic, change, derivative, error in columns
    ]


def _along(directions: Tensor, gradient: Tensor) -> Tensor:
    """Return the derivatives along directions. Entries do not count along which nothing moves."""
    return torch.where(directions == 0, 0.0, directions * gradient).sum(1)


def sensitivity(
    gradient_at: Callable[[Tensor], Tensor], predictions: Tensor, gradient: Tensor
) -> Tensor:
    """Return the changes of a gradient if the last digits of the predictions change.

    Returns
    -------
    shape (2, n)
    """
    near = _neighbours(predictions)
    return torch.stack([gradient_at(moved).flatten() - gradient for moved in near])


def _neighbours(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return two neighbours of ``y``: each prediction moves by two units in the last place.

    Predictions with even and odd index move in opposite directions.
    """
    up, down = y, y
    for _ in range(2):
        up = torch.nextafter(up, torch.full_like(y, torch.inf))
        down = torch.nextafter(down, torch.full_like(y, -torch.inf))
    odd = torch.arange(y.numel()).view_as(y) % 2 == 1
    return torch.where(odd, up, down), torch.where(odd, down, up)


def narrowed(comparison: Comparison, along: Callable[[Tensor], Sequence[Comparison]]) -> Comparison:
    """Return a wrong comparison along a single entry, found by halving the direction.

    Parameters
    ----------
    along : returns the comparisons at the same point along other directions, shape (n, n_entries)
    """
    while (n_moved := int(comparison.direction.count_nonzero())) > 1:
        moved = comparison.direction.nonzero().flatten().split(-(-n_moved // 2))
        halves = torch.zeros(2, len(comparison.direction), dtype=comparison.direction.dtype)
        for half, entries in zip(halves, moved, strict=True):
            half[entries] = comparison.direction[entries]
        worst = max(along(halves), key=lambda each: each.off_by)
        if not worst.wrong:
            break
        comparison = worst
    return comparison


def judge(
    comparisons: Sequence[Comparison],
    cause: str = "",
    table: Callable[[Comparison], str] = lambda comparison: "",
) -> Metrics:
    """Return metrics of the comparisons, or raise an error that describes the worst one.

    Parameters
    ----------
    cause : the likely mistake, if comparisons are wrong
    table : returns a text to show below the worst comparison

    Raises
    ------
    Fail : a comparison is wrong
    Inconclusive : most comparisons are too uncertain to decide
    """
    if not comparisons:
        return {"comparisons": 0}
    wrong = [comparison for comparison in comparisons if comparison.wrong]
    metrics: Metrics = {
        "comparisons": len(comparisons),
        "inconclusive": sum(not comparison.conclusive for comparison in comparisons),
        "largest error in tolerances": max(comparison.off_by for comparison in comparisons),
    }
    if wrong:
        worst = max(wrong, key=_display_priority)
        raise Fail(f"{worst}\n{table(worst)}".rstrip(), cause=cause, **metrics)
    # Half of the probes of a value in float32 may be inconclusive, and of few probes all but two.
    # The others still decide.
    n = len(comparisons)
    if metrics["inconclusive"] > (0.6 * n if n >= 20 else max(n - 2, 0.75 * n)):
        raise Inconclusive(
            f"at {metrics['inconclusive']} of {len(comparisons)} points, finite differences are too"
            " uncertain to show an error of 1 %. There, the value hardly depends on the"
            " predictions, is not smooth, or is random. Declare `smooth`, `stochastic` or `domain`",
            **metrics,
        )
    return metrics


def _display_priority(comparison: Comparison) -> tuple[bool, bool, bool, int]:
    """Return a key that is highest for the comparison that helps the reader most.

    If keys are equal, the first comparison is shown, because the first probes are the simplest.
    """
    # One pose alone says little: its weight is 1 in most combinations. A comparison along several
    # poses is hard to read.
    one_of_several = len(comparison.predictions) > 1
    along_one = int(comparison.direction.count_nonzero()) == 1
    small = float(comparison.predictions.abs().amax()) < 1e3
    return one_of_several, along_one, small, math.frexp(min(comparison.off_by, 1e300))[1] // 4


def equal_with_nan(one: Tensor, other: Tensor) -> bool:
    """Return True if all bits of two results are equal. NaN equals NaN."""
    return torch.equal(one, other) or (
        one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())
    )


def ratio(error: float, tolerance: float) -> float:
    """Return error / tolerance: 0 if there is no error, and infinity if the error is NaN."""
    if error == 0 or (tolerance == math.inf and not math.isnan(error)):
        return 0.0
    return error / tolerance if tolerance and not math.isnan(error) else math.inf
