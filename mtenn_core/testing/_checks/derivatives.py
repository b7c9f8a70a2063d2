"""C1: the pose weights are the derivative of the value, by finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mtenn_core._engine.columns import ANY
from mtenn_core._engine.declarations import constructor_arguments
from mtenn_core.combination import Combination
from mtenn_core.testing._checks.check import check
from mtenn_core.testing._outcomes import Metrics
from mtenn_core.testing._probe.causes_in_columns import cause_in_columns
from mtenn_core.testing._probe.comparison import Comparison, compare, judge, narrowed
from mtenn_core.testing._probe.finite_differences import (
    Estimate,
    central_differences,
    climb,
    directional_derivatives,
    extrapolate,
)
from mtenn_core.testing._probe.kinks import kink_cause
from mtenn_core.testing._probe.likely_causes import NOT_FINITE, Point, cause_in_weights
from mtenn_core.testing._probe.poses import Poses
from mtenn_core.testing._probe.subject import Subject
from mtenn_core.testing._probe.underflow import underflowing_weights

# Each row is (poses, base, spread). If a combination is sharp, all weights are 0 or 1 unless the
# spread is small.
PROBES = (
    (3, 0.0, 1.0),
    (3, 0.0, 0.1),
    (3, 0.0, 0.01),
    (3, 0.0, 1e-3),
    (3, 10.0, 1e-3),
    (3, -1e4, 1.0),
    (3, 1e4, 0.01),
    (1, 0.0, 1.0),
    (2, 0.0, 1.0),
    (6, 0.0, 1.0),
    (6, 0.0, 1e-3),
    (6, 0.0, 30.0),
    (33, 0.0, 0.3),  # some mistakes show only above a certain number of poses
)

# These rows cover ΔG in kT and in kcal/mol, pIC50, predictions of one sign, and up to 20 poses.
MORE_PROBES = (
    (3, -8.0, 2.0),
    (3, -30.0, 8.0),
    (3, 7.0, 1.5),
    (3, 0.0, 1e-4),
    (3, 100.0, 10.0),
    (3, -100.0, 3.0),
    (3, -1e3, 100.0),
    (3, 0.0, 5.0),
    (2, -8.0, 0.3),
    (2, 7.0, 1e-3),
    (4, 0.0, 1.0),
    (4, -8.0, 0.01),
    (5, -8.0, 2.0),
    (7, 0.0, 0.3),
    (8, -8.0, 2.0),
    (11, 7.0, 1.0),
    (20, -8.0, 2.0),
    (20, 0.0, 0.01),
)


# For ``pose_columns = "any"``, besides the number of the other probes.
NUMBERS_OF_COLUMNS = (1, 5, 40)


@check("C1", "pose weights are the derivative of the value", "gate")
def pose_weights(subject: Subject) -> Metrics:
    """Compare all weights of a few poses, for predictions of many sizes and spreads.

    Thorough checks add poses of which one has a weight that underflows, and poses with a number
    that is exactly 0.
    """
    points = probes_of(subject)
    if subject.thorough:
        points += underflowing_weights(subject)
        _check_other_numbers_of_columns(subject)
    return judge(*compare_weights(subject, points), partial(step_table, subject))


def _check_other_numbers_of_columns(subject: Subject) -> None:
    """Compare the weights for other numbers of columns, if the combination takes any number."""
    if subject.combination.pose_columns != ANY:
        return
    for n_columns in NUMBERS_OF_COLUMNS:
        other = Subject(subject.original, subject.seed, thorough=True, n_columns=n_columns)
        points = [
            other.probes.poses(n, 0.0, spread) for n, spread in ((1, 1.0), (3, 0.5), (6, 0.1))
        ]
        comparisons, cause = compare_weights(other, points)
        if any(comparison.wrong for comparison in comparisons):
            where = f"if the other numbers of columns are right: wrong for {n_columns} column(s)"
            judge(comparisons, "; ".join(filter(None, [cause, where])), partial(step_table, other))


def probes_of(subject: Subject) -> list[Poses]:
    probes = PROBES + MORE_PROBES if subject.thorough else PROBES
    points = [subject.probes.poses(n, base, spread) for n, base, spread in probes]
    if subject.thorough:
        poses = subject.probes.poses(4)
        ascending = poses.predictions.view(len(poses), -1)[:, 0].argsort().tolist()
        points += [poses[ascending], poses[ascending[::-1]]]
        if subject.combination.smooth:
            points += [poses[[0, *range(len(poses) - 1)]], poses.tied()]
        for spread in (1.0, 1e-3):  # if a combination is sharp, only one of many poses counts
            points += _with_a_zero(subject, subject.probes.poses(4, 0.0, spread))
    return points


def _with_a_zero(subject: Subject, poses: Poses) -> list[Poses]:
    """Return poses with one prediction, or one entry of a pose input, that is exactly 0.

    Random fractions do not show that ``> 0`` and ``>= 0`` differ, or that 0 counts as padding.
    """
    low, high = subject.combination.domain
    found = []
    if low < 0 < high and subject.combination.smooth:  # there may be a kink at 0
        y = poses.predictions.clone()
        y.view(-1)[0] = 0
        found.append(poses.at(y))
    for name, numbers in poses.inputs.items():
        if name in subject.probes.labels() or subject.probes.is_positive(name):
            continue
        with_zero = poses.with_input(name, torch.cat([numbers.new_zeros(1), numbers[1:]]))
        if _has_finite_value(subject, with_zero):
            found.append(with_zero)
    return found


def _has_finite_value(subject: Subject, poses: Poses) -> bool:
    try:
        return bool(subject.value(poses).isfinite())
    except Exception:  # 0 may be invalid
        return False


def compare_weights(subject: Subject, points: list[Poses]) -> tuple[list[Comparison], str]:
    """Return the comparisons at some probes, and the likely cause if weights are wrong."""
    comparisons, known = [], []
    for poses, directions, numerical in _derivatives(subject, points):
        found = _compare_both(subject, poses, directions, numerical)
        comparisons += found
        known.append((found, numerical))
    wrong = [comparison for comparison in comparisons if comparison.wrong]
    if not wrong:
        return comparisons, ""
    if subject.probes.columns is not None and not any(map(_names_an_entry, wrong)):
        widest = max(wrong, key=lambda each: len(each.predictions) > 1)
        comparisons.append(narrowed(widest, partial(_compare_along, subject, widest)))
    return comparisons, _cause(subject, known)


def _names_an_entry(comparison: Comparison) -> bool:
    """Return True if one number of several poses moves."""
    return len(comparison.predictions) > 1 and int(comparison.direction.count_nonzero()) == 1


def _compare_both(
    subject: Subject, poses: Poses, directions: Tensor, numerical: Estimate
) -> list[Comparison]:
    """Compare the weights of stored gradients, and those of autograd if they may differ."""
    weights_of = {"pose": subject.weights}
    if subject.two_derivatives:
        weights_of[_OF_COMBINE] = subject.autograd_weights
    columns = subject.probes.columns
    return [
        replace(each, columns=columns)
        for unit, function in weights_of.items()
        for each in compare_at(
            function, numerical, directions, poses, unit, tuple(poses.predictions.shape)
        )
    ]


_OF_COMBINE = "autograd of combine, pose"


def _compare_along(subject: Subject, wrong: Comparison, directions: Tensor) -> list[Comparison]:
    """Repeat a comparison along other directions."""
    poses = wrong.poses
    fd = directional_derivatives(
        subject.values,
        poses.row().expand(len(directions), -1),
        directions,
        torch.full((len(directions),), subject.probes.first_step(poses.predictions)),
    )
    found = _compare_both(subject, poses, directions, fd)
    return [each for each in found if each.unit == wrong.unit]


def compare_at(
    weights_of: Callable[[Poses], Tensor],
    fd: Estimate,
    directions: Tensor,
    poses: Poses,
    unit: str,
    shape: tuple[int, ...] = (),
) -> list[Comparison]:
    """Compare a gradient at some poses with finite differences along ``directions``.

    Parameters
    ----------
    shape : shape of what moves, to name its entries
    """
    weights_at = poses.fixed(weights_of)
    found = compare(weights_at, fd, directions, poses.predictions, unit, poses.inputs)
    return [replace(each, shape=shape) for each in found]


def _derivatives(subject: Subject, points: list[Poses]) -> Iterator[tuple[Poses, Tensor, Estimate]]:
    """Yield poses with their directions, and the derivatives along these directions.

    Probes with equal numbers of poses are evaluated together.
    """
    groups: dict[int, list[Poses]] = {}
    for poses in points:
        groups.setdefault(len(poses), []).append(poses)
    directions = {
        n_poses: directions_for(subject, group[0].predictions.numel())
        for n_poses, group in groups.items()
    }
    ladders = []
    for n_poses, group in groups.items():
        along = directions[n_poses]
        steps = torch.tensor([subject.probes.first_step(poses.predictions) for poses in group])
        ladders.append(
            climb(
                subject.values,
                torch.stack([poses.row() for poses in group]).repeat_interleave(len(along), dim=0),
                along.repeat(len(group), 1),
                steps.repeat_interleave(len(along)),
            )
        )
    sizes = [len(directions[n_poses]) for n_poses, group in groups.items() for _ in group]
    by_point = (column.split(sizes) for column in extrapolate(ladders))
    ordered = [poses for group in groups.values() for poses in group]
    for poses, derivatives, errors in zip(ordered, *by_point, strict=True):
        yield poses, directions[len(poses)], Estimate(derivatives, errors)


def _cause(subject: Subject, known: list[tuple[list[Comparison], Estimate]]) -> str:
    """Return the likely cause, from the probes at which all weights were compared."""
    if any(not math.isfinite(c.analytic) for comparisons, _ in known for c in comparisons):
        return NOT_FINITE
    found = [c for comparisons, _ in known for c in comparisons]
    if cause := kink_cause(subject, found) or _cause_at_zero(subject, found):
        return cause
    points: list[Point] = []
    for comparisons, numerical in known:
        poses = comparisons[0].poses
        if len(numerical.derivative) != poses.predictions.numel():
            continue
        ours = [c for c in comparisons if c.unit == "pose"]
        if not any(c.wrong for c in comparisons if c.unit == "pose") and any(
            c.wrong for c in comparisons
        ):
            return (
                "autograd cannot differentiate all of combine (a part is detached, or does not use"
                " the predictions), but gradients='graph' needs this derivative"
            )
        analytic = torch.tensor([c.analytic for c in ours], dtype=torch.float64)
        tolerance = max(c.tolerance for c in ours)
        if math.isfinite(tolerance):
            wrong = any(c.wrong for c in ours)
            points.append(Point(poses, analytic, numerical.derivative, tolerance, wrong))
    scales = scales_of(subject.combination)
    if subject.probes.columns is not None:
        return _jacobian_cause(subject, points) or cause_in_columns(
            points, subject.probes.columns, scales
        )
    return cause_in_weights(points, subject.weights, scales)


def _jacobian_cause(subject: Subject, points: list[Point]) -> str:
    """Return the cause if the derivative of a vector is that of the swapped entries, else ""."""
    wrong = [point for point in points if point.wrong]
    n_columns = subject.probes.shape(1)[-1]
    if subject.factors is None or len(subject.factors) != n_columns or not wrong:
        return ""
    factors = torch.tensor(subject.factors, dtype=torch.float64)
    for point in wrong:
        jacobian = subject.weights_of_results(point.poses)  # (result, pose, column)
        swapped = torch.einsum("r,cpr->pc", factors, jacobian).flatten()
        # A diagonal Jacobian is its own transpose, which may be within the tolerance.
        if point.fits(swapped) or not point.expects(swapped):
            return ""
    return (
        "the Jacobian is transposed: the derivative of result i with respect to column j is that of"
        " result j with respect to column i"
    )


def _cause_at_zero(subject: Subject, comparisons: list[Comparison]) -> str:
    """Return the cause if weights are wrong only where a number is exactly 0, else ""."""
    names = {"predictions", *subject.combination.pose_inputs} - {*subject.probes.labels()}
    for name in sorted(names):
        at_zero = [c for c in comparisons if (c.poses.named()[name] == 0).any()]
        elsewhere = len(comparisons) - len(at_zero)
        if elsewhere and sum(c.wrong for c in at_zero) == sum(c.wrong for c in comparisons):
            what = "a prediction" if name == "predictions" else f"pose input {name!r}"
            return (
                f"wrong only where {what} is exactly 0: > 0 in one place and >= 0 in another, or 0"
                " taken as padding"
            )
    return ""


def scales_of(combination: Combination) -> dict[str, float]:
    """Return the arguments and attributes of a combination that are numbers, except 1 and 0."""
    found: dict[str, object] = dict(vars(combination)) | dict(constructor_arguments(combination))
    found |= {name: p.item() for name, p in combination.named_parameters() if p.numel() == 1}
    for name in dir(type(combination)):
        if not name.startswith("_"):
            found.setdefault(name, getattr(type(combination), name))
    return {
        name.lstrip("_"): float(value)
        for name, value in found.items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and name != "min_poses"
        and math.isfinite(value)
        and value not in (0, 1)
    }


# With columns, a few poses have more numbers than without. They are evaluated in batches.
FEW_ENTRIES = 24


def directions_for(subject: Subject, n: int) -> Tensor:
    """Return all axes for few inputs, else two random directions: shape (n_directions, n)."""
    few = 6 if subject.thorough else 4
    if subject.probes.columns is not None and subject.may_batch:
        few = FEW_ENTRIES
    if n <= few:
        return torch.eye(n, dtype=torch.float64)
    # The entries are ±1/2 and ±1, so that steps along the directions are exact.
    return subject.probes.randn(2, n).sign() * (3 + subject.probes.randn(2, n).sign()) / 4


def step_table(subject: Subject, comparison: Comparison) -> str:
    """Return a table of step sizes and |central difference - weight|, as text."""
    first_step = subject.probes.first_step(comparison.predictions)
    steps, differences = central_differences(
        subject.values, comparison.poses.row(), comparison.direction, first_step
    )
    errors = (differences - comparison.analytic).abs()
    columns = [(f"{steps[k]:.0e}", f"{errors[k]:.0e}") for k in range(0, len(steps), 4)]
    rows = ("  ".join(column) for column in zip(*columns, strict=True))
    names = ("step size", "|error|  ")
    return "\n".join(f"    {name}  {row}" for name, row in zip(names, rows, strict=True))
