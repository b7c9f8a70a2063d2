"""A10: second derivatives, which gradient penalties need, are right or an error."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from mtenn_core._engine.declarations import overrides
from mtenn_core._engine.evaluation import combined_prediction
from mtenn_core.testing._checks.check import check
from mtenn_core.testing._checks.derivatives import directions_for
from mtenn_core.testing._outcomes import Advice, Metrics
from mtenn_core.testing._probe.comparison import Comparison, compare, judge
from mtenn_core.testing._probe.finite_differences import directional_derivatives
from mtenn_core.testing._probe.poses import Poses
from mtenn_core.testing._probe.subject import Subject

# Each row is (poses, base, spread). Spreads are small, too, because a sharp combination has
# constant weights unless the predictions are near each other.
PROBES = (
    (2, 0.0, 1.0),
    (3, 0.0, 1.0),
    (3, 0.0, 0.01),
    (3, -8.0, 2.0),
    (4, 7.0, 1e-3),
    (7, 0.0, 0.3),
)


@check("A10", "double backward is right or an error")
def double_backward(subject: Subject) -> Metrics:
    """Check the second derivative of ``combine``, and that double backward of ``forward`` raises.

    ``gradients="graph"`` promises second derivatives, and takes them from ``combine``. In
    ``forward``, the gradients of the poses are constants, so a second derivative cannot be right.
    There it is not promised, so a wrong number is only advice.
    """
    metrics: Metrics = {}
    if overrides(type(subject.combination), "combine"):
        metrics = _check_combine(subject)
    _check_forward(subject)
    return metrics


def _check_forward(subject: Subject) -> None:
    step = subject.probes.step({"w": (2,)})
    (param,) = step.params.values()
    # The loss is nonlinear, because the second derivative of a linear loss is zero.
    loss = subject.call(step).square()
    try:
        (gradient,) = torch.autograd.grad(loss, param, create_graph=True)
        (loss + gradient.square().sum()).backward()
    except Exception:
        return
    raise Advice(
        "a loss that contains gradients, such as a gradient penalty, trains with wrong numbers"
        f" without a warning: double backward gives the gradient {param.grad}, which contains only"
        " a part of the Hessian, instead of an error",
        cause="decorate backward with torch.autograd.function.once_differentiable",
    )


def _check_combine(subject: Subject) -> Metrics:
    """Compare autograd's second derivative of ``combine`` with finite differences of the first."""
    comparisons: list[Comparison] = []
    for i, (n_poses, base, spread) in enumerate(PROBES):
        poses = subject.probes.poses(n_poses, base, spread)
        comparisons += _of_weight(subject, poses, i % len(poses))
    # A second derivative may be zero or tiny, as that of a mean. Then it is not known to 1 %.
    comparisons = [each for each in comparisons if each.conclusive or each.wrong]
    return judge(
        comparisons,
        "autograd cannot differentiate all of combine twice (a part of the first derivative is"
        " detached), but gradients='graph' needs this derivative, for example for a gradient"
        " penalty. Use operations of torch, or raise an error in backward if"
        " torch.is_grad_enabled(); once_differentiable raises none for a loss that is linear",
    )


def _of_weight(subject: Subject, poses: Poses, of: int) -> list[Comparison]:
    """Compare the derivatives of the weight of one pose with respect to the predictions.

    Parameters
    ----------
    of : index of the pose
    """
    try:
        _second_derivative(subject, of, poses)
    except Exception:  # an error is allowed
        return []
    directions = directions_for(subject, len(poses))
    fd = directional_derivatives(
        partial(_weights, subject, poses, of),
        poses.predictions.expand(len(directions), -1),
        directions,
        torch.full((len(directions),), subject.probes.first_step(poses.predictions)),
    )
    second_derivative_at = poses.fixed(partial(_second_derivative, subject, of))
    unit = f"autograd of combine, twice: derivative of the weight of pose {of}, by pose"
    return compare(second_derivative_at, fd, directions, poses.predictions, unit, poses.inputs)


def _weights(subject: Subject, poses: Poses, of: int, rows: Tensor) -> Tensor:
    """Return the weight of one pose for many predictions, shape (batch,)."""
    return torch.stack([subject.autograd_weights(poses.at(row))[of] for row in rows])


def _second_derivative(subject: Subject, of: int, poses: Poses) -> Tensor:
    """Return ∂²h/∂ŷ_of∂ŷ_i for each pose i, shape (n_poses,)."""
    with subject.restored_state(), torch.inference_mode(False), torch.enable_grad():
        y = poses.predictions.detach().clone().requires_grad_()
        value = combined_prediction(
            subject.combination, y, poses.copied_inputs(), closed_form=False
        )
        (weights,) = torch.autograd.grad(value, y, create_graph=True)
        if not weights.requires_grad:  # it is constant, or detached
            return torch.zeros_like(y)
        (found,) = torch.autograd.grad(weights[of], y, materialize_grads=True)
        return found
