"""D1 and D2: comparisons of the value with a reference and with declared properties.

They are needed because a wrong value may have a correct derivative.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mtenn_core._engine.declarations import overrides
from mtenn_core.testing._checks.check import check
from mtenn_core.testing._outcomes import Fail, Metrics, Skip
from mtenn_core.testing._probe.comparison import compare, judge, ratio
from mtenn_core.testing._probe.finite_differences import Estimate, resolution
from mtenn_core.testing._probe.kinks import kink_cause
from mtenn_core.testing._probe.poses import Poses
from mtenn_core.testing._probe.subject import Subject

# Two formulas for one value have different roundoff. One of them may also scale it up.
VALUE_DIGITS = 1e-10

SPREADS = ((0.0, 1.0), (0.0, 0.01), (-8.0, 2.0), (7.0, 1.5), (100.0, 10.0))

Statement = Callable[[Poses], Tensor]


@check("D1", "the value equals the declared reference")
def reference(subject: Subject) -> Metrics:
    """Compare value and derivative with those of the declared reference.

    If the class has its own ``forward``, they are also compared with those of ``combine``.
    """
    combination = subject.combination
    statements: dict[str, Statement] = {}
    if overrides(type(combination), "reference"):
        statements["reference"] = lambda p: combination.reference(
            p.predictions, **p.copied_inputs()
        )
    if subject.full_depth and overrides(type(combination), "combine"):
        statements["combine"] = partial(_statement, combination.combine)
    if not statements:
        raise Skip("it declares no reference")
    worst = 0.0
    for n in (1, 2, 3, 4, 9):
        for base, spread in SPREADS:
            poses = subject.probes.poses(n, base, spread)
            for what, statement in statements.items():
                worst = max(worst, _check_statement(subject, what, statement, poses))
    return {"largest error in tolerances": worst}


def _statement(method: Callable[..., Tensor], poses: Poses) -> Tensor:
    return method(poses.predictions, **poses.copied_inputs())


def _check_statement(subject: Subject, what: str, statement: Statement, poses: Poses) -> float:
    with subject.restored_state(), torch.enable_grad():
        leaf = poses.predictions.clone().requires_grad_()
        expected = statement(poses.at(leaf))
        if subject.probes.columns is not None:
            _check_results(subject, what, poses)
        found = subject.value(poses)
        off = _error_in_tolerances(subject, found, expected.detach(), poses, statement)
        if off > 1:
            raise Fail(
                f"{poses}\n"
                f"    your value         {found.item():.12g}\n"
                f"    {what:<18} {expected.item():.12g}",
                cause=_value_cause(found, expected.detach(), poses.predictions),
            )
        if not expected.requires_grad:
            return off
        (gradient,) = torch.autograd.grad(expected, leaf, materialize_grads=True)
    if gradient.isfinite().all():
        # The derivative of the reference also has roundoff.
        error = 1e-9 * gradient.abs().amax().expand(gradient.numel())
        exact = Estimate(gradient.flatten(), error)
        axes = torch.eye(gradient.numel(), dtype=gradient.dtype)
        weights_at = poses.fixed(subject.weights)
        comparisons = compare(weights_at, exact, axes, poses.predictions, "pose", poses.inputs)
        shape, columns = tuple(gradient.shape), subject.probes.columns
        comparisons = [
            replace(each, against=f"that of {what}", shape=shape, columns=columns)
            for each in comparisons
        ]
        kink = kink_cause(subject, comparisons)
        judge(comparisons, kink or f"the weights are not those of the {what}")
    return off


def _check_results(subject: Subject, what: str, poses: Poses) -> None:
    """Compare the shapes of a value with columns and of its reference, and then each entry."""
    expected, found = subject.result(poses, what), subject.result(poses)
    if expected.shape != found.shape:
        raise Fail(
            f"the {what} must return the shape of the value, {tuple(found.shape)}; found"
            f" {tuple(expected.shape)}"
        )
    for i, pair in enumerate(zip(found.flatten(), expected.flatten(), strict=True)):
        if _error_in_tolerances(subject, *pair, poses) > 1:
            which = f", entry {i} of {len(found)}" if found.dim() else ""
            raise Fail(
                f"{poses}\n"
                f"    your value{which:<10} {pair[0].item():.12g}\n"
                f"    {what + which:<20} {pair[1].item():.12g}",
                cause=_value_cause(*pair, poses.predictions),
            )


def _error_in_tolerances(
    subject: Subject,
    found: Tensor,
    expected: Tensor,
    poses: Poses,
    statement: Statement | None = None,
) -> float:
    """Return difference / tolerance of two values, or 0 if they are equal or both are NaN."""
    if found == expected or (found.isnan() and expected.isnan()):  # infinities may be equal
        return 0.0
    y, value_at = poses.predictions, poses.fixed(subject.value)
    size = max(float(y.abs().amax()), abs(float(expected)))
    tolerance = VALUE_DIGITS * size
    difference = abs(float(found) - float(expected))
    if not difference <= tolerance:  # the value may be computed in float32
        eps = resolution(torch.stack([value_at(y + k) for k in (0.0, 0.125, 0.25)]))
        tolerance = max(VALUE_DIGITS, 64 * len(y) * eps) * size
    if not difference <= tolerance:  # terms may cancel in either function
        each = [value_at, *([poses.fixed(statement)] if statement else [])]
        tolerance += 8 * sum(_roundoff(function, y) for function in each)
    return ratio(difference, tolerance)


def _roundoff(function: Callable[[Tensor], Tensor], y: Tensor) -> float:
    """Return the roundoff of a value: its deviation from a straight line very near ``y``."""
    near = torch.stack([function(y * (1 + k * 2.0**-33)).detach() for k in range(9)])
    return float(near.diff().diff().abs().amax().nan_to_num(0.0))


def _value_cause(found: Tensor, expected: Tensor, y: Tensor) -> str:
    n, difference = len(y), float(found - expected)
    known = {
        "the value has the opposite sign": float(-2 * expected),
        "the value is too large by ln(n_poses): a sum instead of a mean": math.log(n),
        "the value is too small by ln(n_poses): a mean instead of a sum": -math.log(n),
        "the value is n_poses times too large": float((n - 1) * expected),
        "the value is divided by n_poses": float((1 / n - 1) * expected),
    }
    for cause, offset in known.items():
        if offset and math.isclose(difference, offset, rel_tol=1e-6):
            return cause
    for word, extreme in (("highest", y.amax()), ("lowest", y.amin()), ("mean", y.mean())):
        if math.isclose(float(found), float(extreme), rel_tol=1e-9):
            return f"the value is the {word} prediction"
    return "the value is wrong; a correct derivative of a wrong value does not help"


# Each property that a combination may declare, and the message if it does not hold.
Property = Callable[[Subject, Poses], tuple[Tensor, Tensor]]


def _permuted(subject: Subject, poses: Poses) -> tuple[Tensor, Tensor]:
    return subject.result(poses[subject.probes.permutation(len(poses))]), subject.result(poses)


def _translated(subject: Subject, poses: Poses) -> tuple[Tensor, Tensor]:
    y = poses.predictions
    by = min(2.0, subject.probes.first_step(y)) if subject.bounded else 2.5
    return subject.result(poses.at(y + by)), subject.result(poses) + by


def _within(subject: Subject, poses: Poses) -> tuple[Tensor, Tensor]:
    value = subject.result(poses)
    return value, value.clamp(poses.predictions.amin(), poses.predictions.amax())


def _increasing(subject: Subject, poses: Poses) -> tuple[Tensor, Tensor]:
    weights = subject.weights_of_results(poses)
    return weights.amin(), weights.amin().clamp(min=0)


def _of_equal_poses(subject: Subject, poses: Poses) -> tuple[Tensor, Tensor]:
    value, expected = subject.result(poses.tied()), poses.predictions[0]
    if value.shape != expected.shape:
        raise Fail(
            "idempotent: if all poses are equal, the value must be the numbers of that pose, shape"
            f" {tuple(expected.shape)}; found a value of shape {tuple(value.shape)}",
            cause="do not declare idempotent: the value has not one number for each column",
        )
    return value, expected


def _replicated(subject: Subject, poses: Poses) -> tuple[Tensor, Tensor]:
    return subject.result(poses[2 * [*range(len(poses))]]), subject.result(poses)


def _without_nan(subject: Subject, poses: Poses) -> tuple[Tensor, Tensor]:
    more = poses[[*range(len(poses)), 0]]
    more.predictions[-1] = math.nan
    return subject.result(more), subject.result(poses)


PROPERTIES: dict[str, tuple[Property, str]] = {
    "permutation_invariant": (_permuted, "the order of the poses changes the value"),
    "translation_equivariant": (
        _translated,
        "h(y + c) must equal h(y) + c: do the weights sum to 1?",
    ),
    "bounded": (_within, "the value leaves the range of the predictions"),
    "monotone": (_increasing, "a weight is negative: a higher prediction gives a lower value"),
    "idempotent": (
        _of_equal_poses,
        "the value of equal predictions is another number: is the normalisation wrong?",
    ),
    "replication_invariant": (
        _replicated,
        "if each pose appears twice, the value changes: is there a sum instead of a mean?",
    ),
    "ignores_nan": (_without_nan, "a further pose with a prediction of NaN changes the value"),
}


# Properties that another check tests, and the id of this check.
TESTED_ELSEWHERE = {"half_precision": "D4"}


@check("D2", "the declared properties hold")
def properties(subject: Subject) -> Metrics:
    """Check each declared property, for several numbers, sizes and spreads of predictions."""
    declared = sorted(subject.combination.properties)
    known = [*PROPERTIES, *TESTED_ELSEWHERE]
    unknown = [name for name in declared if name not in known]
    if unknown:
        raise Fail(f"unknown properties {unknown}; known properties: {', '.join(known)}")
    tested = [name for name in declared if name in PROPERTIES]
    if not tested:
        others = [f"{TESTED_ELSEWHERE[name]} tests {name}" for name in declared]
        raise Skip("; ".join(others) or "it declares no properties")
    worst = 0.0
    for name in tested:
        sides, cause = PROPERTIES[name]
        for n in (2, 3, 7, 20):
            for base, spread in SPREADS:
                poses = subject.probes.poses(n, base, spread)
                worst = max(worst, _check_property(subject, name, sides, cause, poses))
    return {"largest error in tolerances": worst}


def _check_property(
    subject: Subject, name: str, sides: Property, cause: str, poses: Poses
) -> float:
    sides_of_value = sides(subject, poses)
    worst = 0.0
    for i, pair in enumerate(zip(*(side.flatten() for side in sides_of_value), strict=True)):
        off = _error_in_tolerances(subject, pair[0], pair[1], poses)
        if off > 1:
            where = f", entry {i} of the value" if sides_of_value[0].dim() else ""
            raise Fail(
                f"{name}{where}: {poses}\n"
                f"    found              {pair[0].item():.12g}\n"
                f"    expected           {pair[1].item():.12g}",
                cause=cause,
            )
        worst = max(worst, off)
    return worst
