"""D4: predictions in float32, bfloat16 and float16."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mtenn_core._process.printable import error_text
from mtenn_core.testing._checks.check import check
from mtenn_core.testing._checks.many_poses import few_if_wide
from mtenn_core.testing._outcomes import Advice, Fail, Metrics, Outcome
from mtenn_core.testing._probe.comparison import FLOAT32, ratio
from mtenn_core.testing._probe.poses import Poses
from mtenn_core.testing._probe.subject import Subject
from mtenn_core.testing._probe.training_step import Step, gradients_of

# (poses, base, spread). Among 30 poses, some have nearly the same prediction.
LOW_PRECISION_PROBES = (
    (4, 0.0, 1.0),
    (4, -8.0, 2.0),
    (30, -8.0, 1.0),
    (4, -80.0, 4.0),
    (4, -300.0, 4.0),
)


# All other checks of the gate use float64.
GATE_PROBES = ((4, 0.0, 1.0), (30, -8.0, 1.0))


@check("D4", "low precision keeps its dtype and computes in float32", "gate")
def low_precision(subject: Subject) -> Metrics:
    """Compare float32, bfloat16 and float16 with float64. The gate compares only float32.

    The float64 predictions are converted from the other dtype, so they have the same rounding.

    Half precision is promised for ``combine``, which the core calls with float32, and for a class
    that declares it. For other classes, imprecise numbers are advice.
    """
    worst = _check_dtype(subject, torch.float32)
    is_promised = not subject.full_depth or "half_precision" in subject.combination.properties
    hazards = []
    for dtype in (torch.bfloat16, torch.float16) if subject.thorough else ():
        try:
            worst = max(worst, _check_dtype(subject, dtype))
        except Imprecise as outcome:
            if is_promised:
                raise
            hazards.append(f"training in {dtype} loses digits without a warning:\n{outcome}")
        except Outcome:
            raise
        except Exception as error:
            if is_promised:
                raise
            hazards.append(f"training in {dtype} raises {error_text(error)}")
    if hazards:
        raise Advice(hazards[0], cause=_TO_DO)
    return {"largest error in tolerances": worst}


def _check_dtype(subject: Subject, dtype: torch.dtype) -> float:
    """Return the largest error / tolerance of values in this dtype.

    Raises
    ------
    Imprecise : a value or gradient is less precise than the dtype
    Fail : the value has another dtype
    """
    worst = 0.0
    for n, base, spread in LOW_PRECISION_PROBES if subject.thorough else GATE_PROBES:
        if base < -256 and dtype != torch.float16:
            continue  # these predictions test whether a square overflows in float16
        poses = _in_domain(subject, subject.probes.poses(n, base, spread), dtype)
        # Rounding may make ties, and a value with kinks has several derivatives at a tie.
        y = poses.predictions
        if subject.combination.smooth or len(y.unique()) == y.numel():
            is_brief = not subject.thorough or subject.probes.columns is not None
            shapes = {"w": (3,), "scalar": ()} if is_brief else None
            step = subject.probes.step(shapes, len(poses))
            worst = max(worst, _check_precision(subject, step, poses))
    if dtype == torch.float32 or not subject.combination.smooth:
        return worst
    # A sum of many small terms of one sign stops growing in half precision.
    step = subject.probes.step({"w": (4,)}, few_if_wide(subject, 1000))
    step.gradients["w"].abs_()
    poses = _in_domain(subject, subject.probes.poses(len(step.poses), -9.0, 0.0), dtype)
    return max(worst, _check_precision(subject, step, poses))


class Imprecise(Fail):
    """A value or gradient is less precise than its dtype."""


def _in_domain(subject: Subject, poses: Poses, dtype: torch.dtype) -> Poses:
    """Return poses in another dtype.

    Predictions that rounding moves out of the domain are replaced.
    """
    low, high = subject.combination.domain
    poses = poses.map(lambda numbers: numbers.to(dtype))
    y = poses.predictions
    inside = (y > low) & (y < high) & y.isfinite()
    return poses.at(torch.where(inside, y, subject.probes.predictions(1).to(dtype)))


def _check_precision(subject: Subject, step: Step, poses: Poses) -> float:
    dtype = poses.predictions.dtype
    narrow = replace(step.to(dtype), poses=poses)
    wide = narrow.to(torch.float64)
    value = subject.call(narrow, combination=subject.copy(), **_views(narrow))
    if value.dtype != dtype:
        raise Fail(
            f"predictions in {dtype}: expected the value in that dtype; found {value.dtype}",
            cause="cast the result back: value.to(predictions.dtype)",
        )
    if subject.combination.stochastic:  # another dtype has other random numbers
        return 0.0
    off = _check_value(subject, value, wide.poses)
    expected = subject.gradients(wide, **_views(wide))
    weights_at = partial(_flat_weights, subject)
    weights = weights_at(wide.poses)
    few = len(poses) <= 30
    # This is slow. For many poses, compute it only if it is needed.
    moved = _change_by_last_digit(subject, weights_at, wide.poses, weights) if few else None
    # A small weight may have the roundoff of a usual weight. For example, the derivative of tanh is
    # computed as 1 - tanh².
    usual = float(subject.weights(subject.probes.poses(4)).abs().amax())
    digits = 2048 if dtype == torch.float32 else 16
    slack = digits * torch.finfo(dtype).eps * weights.abs() + 8 * FLOAT32 * usual
    limits = torch.finfo(dtype)
    for name, gradient in gradients_of(value, narrow.params).items():
        sizes = wide.gradients[name].abs()
        tolerance = limits.tiny + torch.tensordot(slack, sizes, dims=1)
        error = (gradient.double() - expected[name]).abs()
        most = weights.abs().clamp(min=usual)
        beyond = torch.tensordot(most, sizes + 1, dims=1) > limits.max / 2
        allowed = beyond | ~expected[name].isfinite()
        if not ((error <= tolerance) | allowed).all():  # the value may be stiff here
            if moved is None:
                moved = _change_by_last_digit(subject, weights_at, wide.poses, weights)
            tolerance = limits.tiny + torch.tensordot(slack + 8 * moved, sizes, dims=1)
        if not ((error <= tolerance) | allowed).all():
            at = int((error - tolerance).nan_to_num(math.inf).argmax())
            raise Imprecise(
                f"{poses} in {dtype}, parameter {name!r}, entry {at}\n"
                f"    your backward      {gradient.flatten()[at].item():.8g}\n"
                f"    in float64         {expected[name].flatten()[at].item():.8g}"
                f" ± {tolerance.flatten()[at].item():.1e}",
                cause=_LOW_PRECISION,
            )
    return off


def _flat_weights(subject: Subject, poses: Poses) -> Tensor:
    return subject.weights(poses).flatten()


def _views(step: Step) -> dict[str, Any]:
    """Return predictions and gradients as views of one buffer each.

    This is faster than a copy of each tensor.
    """
    gradients = {n: list(step.by_pose(each.clone())) for n, each in step.gradients.items()}
    return {"pred_list": list(step.poses.predictions.clone()), "grad_dict": gradients}


def _check_value(subject: Subject, value: Tensor, poses: Poses) -> float:
    """Return error / tolerance of a value in low precision."""
    expected = subject.value(poses)
    size = max(float(poses.predictions.abs().amax()), abs(float(expected)))
    moved = float(_change_by_last_digit(subject, subject.value, poses, expected))
    limits = torch.finfo(value.dtype)
    if abs(float(expected)) > limits.max / 2:
        return 0.0
    # Half precision is rounded once, at the end; float32 may be rounded at each step.
    digits = 256 if value.dtype == torch.float32 else 4
    tolerance = digits * limits.eps * size + 8 * moved
    off = ratio(abs(float(value) - float(expected)), tolerance)
    if not off <= 1:
        raise Imprecise(
            f"{poses} in {value.dtype}\n"
            f"    your value         {value.item():.8g}\n"
            f"    in float64         {expected.item():.8g} ± {tolerance:.1e}",
            cause=_LOW_PRECISION,
        )
    return off


def _change_by_last_digit(
    subject: Subject, function: Callable[[Poses], Tensor], poses: Poses, at: Tensor
) -> Tensor:
    """Return the change of a result if the last digit of its inputs in float32 changes.

    Labels stay as they are: they are exact in every dtype, and others may raise an error.
    """
    fixed = {name: poses.inputs[name] for name in subject.probes.labels()}

    def nearby(numbers: Tensor, sign: int) -> Tensor:
        by = sign * torch.finfo(torch.float32).eps * numbers.abs()
        odd = torch.arange(numbers.numel()).view_as(numbers) % 2 == 1
        return numbers + torch.where(odd, by, -by)

    near = [poses.map(partial(nearby, sign=sign)).with_inputs(fixed) for sign in (-1, 1)]
    return torch.stack([(function(each) - at).abs() for each in near]).amax(0)


_LOW_PRECISION = (
    "the arithmetic is in the dtype of the predictions: compute in float32 at least, and shift by"
    " the extreme before scaling, because t·y without a shift loses digits and overflows float16"
)
_TO_DO = (
    "compute in float32 at least, shift by the extreme before scaling, and convert the result back:"
    " value.to(predictions.dtype)"
)
