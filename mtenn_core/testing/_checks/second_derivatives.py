"""A10: second derivatives, which gradient penalties need, are right or an error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from mtenn_core._engine.columns import named_column
from mtenn_core._engine.declarations import overrides
from mtenn_core._engine.evaluation import combined_prediction
from mtenn_core.testing._checks.check import check
from mtenn_core.testing._checks.derivatives import directions_for
from mtenn_core.testing._outcomes import Advice, Metrics
from mtenn_core.testing._probe.comparison import Comparison, compare, judge
from mtenn_core.testing._probe.finite_differences import directional_derivatives
from mtenn_core.testing._probe.instances import independent_copy, own_parameter
from mtenn_core.testing._probe.poses import Poses
from mtenn_core.testing._probe.probes import LARGEST_STEP
from mtenn_core.testing._probe.subject import Subject

# Each row is (poses, base, spread). Some spreads are small, because a sharp combination has
# constant weights unless the predictions are near each other.
PROBES = (
    (2, 0.0, 1.0),
    (3, 0.0, 1.0),
    (3, 0.0, 0.01),
    (3, -8.0, 2.0),
    (4, 7.0, 1e-3),
    (7, 0.0, 0.3),
)
PROBES_OF_PARAMETERS = ((3, 0.0, 1.0), (3, 0.0, 0.01))


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
    for i, probe in enumerate(PROBES):
        poses = subject.probes.poses(*probe)
        comparisons += _by_predictions(subject, poses, i % poses.predictions.numel())
    for name, param in subject.combination.named_parameters():
        if param.requires_grad:
            for i, probe in enumerate(PROBES_OF_PARAMETERS):
                comparisons += _by_parameter(subject, subject.probes.poses(*probe), i, name)
    # A second derivative may be zero or tiny, as that of a mean. Then it is not known to 1 %.
    comparisons = [each for each in comparisons if each.conclusive or each.wrong]
    return judge(
        comparisons,
        "autograd cannot differentiate all of combine twice (a part of the first derivative is"
        " detached), but gradients='graph' needs this derivative, for example for a gradient"
        " penalty. Use operations of torch, or raise an error in backward if"
        " torch.is_grad_enabled(); once_differentiable raises none for a loss that is linear",
    )


def _by_predictions(subject: Subject, poses: Poses, pose: int) -> list[Comparison]:
    """Compare the derivatives of the weight of a pose with respect to the predictions."""
    shape = poses.predictions.shape
    directions = directions_for(subject, shape.numel())
    unit = (
        f"autograd of combine, twice: derivative of the weight of {_place(subject, pose)}, by pose"
    )

    def weights_at(rows: Tensor) -> Tensor:
        return _weights(subject, poses, rows.view(-1, *shape))[:, pose]

    def derivative_at(predictions: Tensor) -> Tensor:
        return _derivative_of_weight(subject, pose, poses.at(predictions.view(shape))).flatten()

    step = subject.probes.first_step(poses.predictions)
    point = poses.predictions.flatten()
    found = _compare(weights_at, derivative_at, point, directions, step, unit, poses)
    columns = subject.probes.columns
    return [replace(each, shape=tuple(shape), columns=columns) for each in found]


def _place(subject: Subject, pose: int) -> str:
    """Return the pose, or the pose and the column, that a weight belongs to."""
    if (columns := subject.probes.columns) is None:
        return f"pose {pose}"
    row, column = divmod(pose, columns.number or 1)
    return f"pose {row}{named_column(columns, column)}"


def _weights(subject: Subject, poses: Poses, rows: Tensor) -> Tensor:
    """Return the weights for many compounds, shape (batch, n_weights).

    One batch for all rows is ten times as fast as a loop. A comparison of three rows shows whether
    the batch is right.
    """

    def one_by_one(rows: Tensor) -> Tensor:
        return torch.stack([subject.autograd_weights(poses.at(row)).flatten() for row in rows])

    if subject.combination.stochastic or any(True for _ in subject.combination.buffers()):
        return one_by_one(rows)
    # Use a copy, because a tensor that combine keeps on self cannot be used after vmap.
    combination = independent_copy(subject.combination)

    def value(row: Tensor) -> Tensor:
        return combined_prediction(combination, row, poses.inputs, closed_form=False)

    try:
        # No torch.func.grad, because it imports torch's compiler.
        leaf = rows.detach().clone().requires_grad_()
        (batch,) = torch.autograd.grad(torch.func.vmap(value)(leaf.clone()).sum(), leaf)
        batch = batch.flatten(1)
        some = [0, -1, 0]
        expected = one_by_one(rows[some])
    except Exception:  # for example, because control flow depends on numbers
        return one_by_one(rows)
    roundoff = 64 * torch.finfo(rows.dtype).eps * expected.abs().amax().nan_to_num()
    is_right = torch.allclose(batch[some], expected, rtol=0, atol=float(roundoff), equal_nan=True)
    return batch if is_right else one_by_one(rows)


def _by_parameter(subject: Subject, poses: Poses, pose: int, name: str) -> list[Comparison]:
    """Compare the derivatives of the weight of a pose with respect to an own parameter."""
    param = own_parameter(subject.combination, name)
    before = param.detach().clone()

    def put_in(setting: Tensor) -> None:
        with torch.no_grad():
            param.copy_(setting.view_as(param))

    def weight_at(setting: Tensor) -> Tensor:
        put_in(setting)
        return subject.autograd_weights(poses).flatten()[pose]

    def weights_at(settings: Tensor) -> Tensor:
        return torch.stack([weight_at(setting) for setting in settings])

    def derivative_at(setting: Tensor) -> Tensor:
        put_in(setting)
        return _derivative_of_weight(subject, pose, poses, name).reshape(-1)

    unit = (
        f"autograd of combine, twice: derivative of the weight of {_place(subject, pose)}, by a"
        f" random direction of parameter {name!r}, {poses}"
    )
    point = before.reshape(-1)
    direction = subject.probes.randn(1, len(point)).sign()
    try:
        found = _compare(weights_at, derivative_at, point, direction, LARGEST_STEP, unit, poses)
        return [replace(each, of_predictions=False) for each in found]
    finally:
        put_in(before)


def _compare(
    weights_at: Callable[[Tensor], Tensor],
    derivative_at: Callable[[Tensor], Tensor],
    point: Tensor,
    directions: Tensor,
    first_step: float,
    unit: str,
    poses: Poses,
) -> list[Comparison]:
    """Compare a second derivative by autograd with the finite differences of a weight.

    Parameters
    ----------
    weights_at : maps many points, shape (batch, n), to the weight at each, shape (batch,)
    derivative_at : maps a point to the derivative of the weight, shape (n,). It may raise an error
    point : shape (n,)
    """
    try:
        derivative_at(point)
    except Exception:  # an error is allowed
        return []
    fd = directional_derivatives(
        weights_at,
        point.expand(len(directions), -1),
        directions,
        torch.full((len(directions),), first_step),
    )
    found = compare(derivative_at, fd, directions, point, unit, poses.inputs)
    return [replace(each, predictions=poses.predictions) for each in found]


def _derivative_of_weight(
    subject: Subject, pose: int, poses: Poses, name: str | None = None
) -> Tensor:
    """Return the derivative of the weight ∂h/∂ŷ_i of pose i.

    Parameters
    ----------
    pose : the index i; with columns, that in the flattened predictions
    name : the own parameter by which to differentiate; None for the predictions
    """
    with subject.restored_state(), torch.inference_mode(False), torch.enable_grad():
        y = poses.predictions.detach().clone().requires_grad_()
        by = y if name is None else own_parameter(subject.combination, name)
        value = combined_prediction(
            subject.combination, y, poses.copied_inputs(), closed_form=False
        )
        (weights,) = torch.autograd.grad(value, y, create_graph=True)
        if not weights.requires_grad:  # it is constant, or detached
            return torch.zeros_like(by)
        (found,) = torch.autograd.grad(weights.flatten()[pose], by, materialize_grads=True)
        return found
